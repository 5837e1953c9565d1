"""Checkpoints that the kernels of a Hopper GPU take, and workers over them as the config makes them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cluster import config_file
from cluster.config import SluiceConfig
from kvtransfer import nixl_transport
from tests.support.checkpoints import redraw
from tests.support.engines import Driver
from workers.assembly import Assembly, WorkerSettings, assemble

BLOCK_SIZE = 64
VOCAB_SIZE = 1000
COMMON: Mapping[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
QWEN: Mapping[str, object] = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
LITE: Mapping[str, object] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 256,
    "n_shared_experts": 2,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_SHAPES: dict[str, Mapping[str, object]] = {
    "qwen": {"model_type": "qwen3", **QWEN},
    "lite": {"model_type": "deepseek_v2", **LITE},
}
# Almost all is chosen of what is longer: keys in fp8 choose otherwise than those of the reference.
_SHAPES["sparse"] = {
    **_SHAPES["lite"],
    "model_type": "deepseek_v32",
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 192,
    "first_k_dense_replace": 3,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 480,
}
FAMILIES = tuple(_SHAPES)


def write_checkpoint(family: str, folder: Path) -> Path:
    """bf16, with text that depends on its context."""
    from transformers.models.auto.configuration_auto import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    shape = dict(_SHAPES[family])
    torch.manual_seed(0)
    config = AutoConfig.for_model(str(shape.pop("model_type")), **COMMON, eos_token_id=0, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    redraw(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    kept = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"rope_theta": 10000, **kept}))
    return folder


def settings(folder: Path, **more: object) -> dict[str, object]:
    return {
        "model.path": str(folder),
        "engine.device": "cuda",
        "engine.strict": True,
        "kv.block_size": BLOCK_SIZE,
        "kv.num_blocks": 160,
        "scheduler.max_batched_tokens": 512,
        "scheduler.chunk_tokens": 128,
        "scheduler.max_sequences": 16,
        "words.heartbeat_timeout_s": 30.0,
        "words.step_timeout_s": 30.0,
        **more,
    }


def assembled(folder: Path, **more: object) -> Assembly:
    """The parts of a worker with both roles, in this process, without sessions."""
    pools = {"mixed": {"roles": ["prefill", "decode"]}}
    config: SluiceConfig = config_file.load(None, settings={"pools": pools, **settings(folder, **more)})
    nixl_transport.prepare_environment()
    told = WorkerSettings.of(config, "mixed", f"alone-{os.getpid()}", b"a secret")
    return assemble(told, lambda done: None)


def driver(parts: Assembly) -> Driver:
    return Driver(parts.engine, parts.scheduler, parts.blocks)


@torch.inference_mode()
def reference_logprobs(folder: Path, tokens: list[int], dtype: torch.dtype) -> Tensor:
    """log p(token i + 1 | tokens up to i) on the CPU, as transformers computes it in that dtype: [len - 1] float32."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    logits = model(torch.tensor([tokens])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

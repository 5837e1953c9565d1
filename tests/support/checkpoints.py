"""Tiny Hugging Face checkpoints whose greedy text does not collapse, made once per test process.

The default initialisation repeats one token for ever, and any two models agree on that. Here every matrix is redrawn
with std 4 / sqrt(inputs) and every embedding with std 0.1: nearly every token of a run differs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tests.support.margins import Margins

VOCAB_SIZE = 512
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _llama(**changes: object) -> PreTrainedModel:
    settings: dict[str, object] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "eos_token_id": VOCAB_SIZE - 1,
        "bos_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))  # pyright: ignore[reportArgumentType]


YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 64,
}
_DEEPSEEK: Mapping[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "max_position_embeddings": 512,
    "eos_token_id": VOCAB_SIZE - 1,
    "bos_token_id": 0,
}
INDEX_TOPK = 16  # of the "deepseek-v32" families: most of a run is sparse


def _deepseek_v32(**changes: object) -> PreTrainedModel:
    indexer = {"index_topk": INDEX_TOPK, "index_n_heads": 16, "index_head_dim": 24}
    config = DeepseekV32Config(**({**_DEEPSEEK, **indexer} | changes))  # pyright: ignore[reportArgumentType]
    return DeepseekV32ForCausalLM(config)


def _deepseek_v3(**changes: object) -> PreTrainedModel:
    return DeepseekV3ForCausalLM(DeepseekV3Config(**({**_DEEPSEEK} | changes)))  # pyright: ignore[reportArgumentType]


FAMILIES: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama-mha-bias": lambda: _llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "llama3-tied": lambda: _llama(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, num_key_value_heads=1),
    "deepseek-v32": _deepseek_v32,
    "deepseek-v32-yarn": lambda: _deepseek_v32(rope_parameters=YARN_ROPE, attention_bias=True),
    "deepseek-v3": _deepseek_v3,
    "deepseek-v3-lite": lambda: _deepseek_v3(q_lora_rank=None),  # queries without a latent
}


@dataclass(frozen=True, slots=True)
class DecidedRun:
    """What transformers says to a prompt, and how clearly. Callers must not change it."""

    prompt: list[int]
    tokens: list[int]
    margin: float
    num_index_choices: int


@cache
def _root() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="sluice-checkpoints-")


@cache
def checkpoint(family: str, dtype: str = "float32") -> Path:
    """The folder of one tiny model of `FAMILIES`. Callers must not change it; copy it first."""
    folder = Path(_root().name) / f"{family}-{dtype}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family]().eval()
        redraw(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Draws all weights anew, in place, from torch's global generator."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            std = 0.1 if "embed" in name else 4 / parameter.shape[-1] ** 0.5
            parameter.normal_(0, std)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(-1.0, 0.3)  # most biased scores are negative, so that masking with 0 would show


@cache
def transformers_model(family: str, dtype: str = "float32") -> PreTrainedModel:
    """The same weights as `checkpoint`, as transformers computes them."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint(family, dtype), dtype=getattr(torch, dtype)).eval()


@torch.inference_mode()
def greedy(family: str, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """What transformers says in fp32, one prompt at a time, end tokens ignored."""
    output = transformers_model(family).generate(  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


# Measured on "deepseek-v32": fp32 of either program is off by up to 4e-5 in router scores, and in index scores (of
# about 7) by 2e-5 in the median, 2e-4 in the 99th percentile and 1e-3 at worst. So this makes a tipped choice rare on
# other machines, and exact ties impossible.
DECIDED = 1e-4


@cache
def decided(family: str, prompts: tuple[tuple[int, ...], ...], count: int, num_tokens: int) -> list[DecidedRun]:
    """The first `count` of `prompts` on whose way no expert, no index choice and no token was chosen by a nose."""
    runs: list[DecidedRun] = []
    for prompt in prompts:
        with Margins() as margins:
            tokens = greedy(family, prompt, num_tokens)
        if margins.smallest > DECIDED:
            runs.append(DecidedRun(list(prompt), tokens, margins.smallest, margins.num_index_choices))
        if len(runs) == count:
            return runs
    raise AssertionError(f"{family}: {len(runs)} of {len(prompts)} prompts are decided, {count} wanted; give more")


def ragged_prompts(count: int = 8, *, longest: int = 60, seed: int = 0) -> list[list[int]]:
    """`count` prompts of 1 to `longest` random tokens; the first has one token, the last is the longest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    lengths[0], lengths[-1] = 1, longest
    return [torch.randint(1, VOCAB_SIZE - 1, (length,), generator=generator).tolist() for length in lengths]

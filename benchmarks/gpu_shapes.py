"""The model shapes that GPU figures are given for, and what a step must move and compute at least."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

V2_LITE: dict[str, object] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "torch_dtype": "bfloat16",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
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
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "max_position_embeddings": 16384,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "eos_token_id": 100001,
}
V2_LITE_FP8 = V2_LITE | {
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
QWEN3_8B: dict[str, object] = {
    "architectures": ["Qwen3ForCausalLM"],
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "eos_token_id": 151645,
}


@dataclass(frozen=True, slots=True)
class GpuShape:
    name: str
    config: Mapping[str, object]
    kv_bytes_per_token: int
    step_bytes: int  # of weights that every decode step reads, experts apart
    expert_bytes: int  # of one routed expert of one layer
    num_sparse_layers: int
    num_experts: int
    experts_per_token: int
    token_flops: float  # of a prompt token outside attention; the head computes last tokens only
    attention_flops: float  # of a prompt token for each token that it sees
    peers: Mapping[str, float]  # the other's figures on an H200, by workload
    other: str = "peer"  # the best engine, or what these weights are in bf16 here
    in_fp8: bool = False  # all products but those of attention

    def write(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(dict(self.config)))

    def decode_bytes(self, num_sequences: int, context: float) -> float:
        """What one step reads when experts are drawn evenly."""
        missed = (1 - self.experts_per_token / self.num_experts) ** num_sequences if self.num_experts else 0.0
        experts = self.num_sparse_layers * self.num_experts * (1 - missed) * self.expert_bytes
        return self.step_bytes + experts + num_sequences * context * self.kv_bytes_per_token

    def prefill_seconds(self, length: int, flops: float, fp8_flops: float) -> float:
        """Of one token of a prompt of that length, on average, at those rates of products in bf16 and in fp8."""
        rate = fp8_flops if self.in_fp8 else flops
        return self.token_flops / rate + self.attention_flops * (length + 1) / 2 / flops


def _v2_lite() -> GpuShape:
    d, inner, heads, vocabulary, layers = 2048, 1408, 16, 102400, 27
    attention = d * heads * 192 + d * 576 + 512 * heads * 256 + heads * 128 * d
    expert, dense = 3 * d * inner, 3 * d * 10944
    sparse = layers - 1
    fixed = layers * attention + dense + sparse * (2 * expert + 64 * d)
    return GpuShape(
        name="v2-lite",
        config=V2_LITE,
        kv_bytes_per_token=2 * 576 * layers,
        step_bytes=2 * (fixed + d * vocabulary),
        expert_bytes=2 * expert,
        num_sparse_layers=sparse,
        num_experts=64,
        experts_per_token=6,
        token_flops=2.0 * (fixed + sparse * 6 * expert),
        attention_flops=2.0 * layers * heads * (192 + 128),
        peers={"mixed256": 11281, "batch1": 3.118, "prefill": 79484, "decode": 10454},
    )


def _v2_lite_fp8() -> GpuShape:
    """Its dense layer ends within a block and stays in bf16, as do the halves of kv_b_proj, the router and the head."""
    shape = _v2_lite()
    d, vocabulary, layers = 2048, 102400, 27
    wide = 3 * d * 10944 + layers * 512 * 16 * 256 + 26 * 64 * d + d * vocabulary
    baseline = json.loads((Path(__file__).parent / "baselines" / "h200-v2-lite.json").read_text())
    bf16 = {figure["name"]: figure["value"] for figure in baseline["figures"]}
    return replace(
        shape,
        name="v2-lite-fp8",
        config=V2_LITE_FP8,
        step_bytes=wide * 2 + (shape.step_bytes - wide * 2) // 2,
        expert_bytes=shape.expert_bytes // 2,
        peers={workload: bf16[workload] for workload in shape.peers},
        other="bf16",
        in_fp8=True,
    )


def _qwen3_8b() -> GpuShape:
    d, inner, heads, kv, dim, vocabulary, layers = 4096, 12288, 32, 8, 128, 151936, 36
    fixed = layers * (d * (heads + 2 * kv) * dim + heads * dim * d + 3 * d * inner)
    return GpuShape(
        name="qwen3-8b",
        config=QWEN3_8B,
        kv_bytes_per_token=2 * 2 * kv * dim * layers,
        step_bytes=2 * (fixed + d * vocabulary),
        expert_bytes=0,
        num_sparse_layers=0,
        num_experts=0,
        experts_per_token=0,
        token_flops=2.0 * fixed,
        attention_flops=2.0 * layers * heads * 2 * dim,
        peers={"mixed256": 9796, "batch1": 5.223, "prefill": 37808, "decode": 7975},
    )


SHAPES = {shape.name: shape for shape in (_v2_lite(), _v2_lite_fp8(), _qwen3_8b())}

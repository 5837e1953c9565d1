"""Tiny shapes of every model family, as transformers builds them; each setting that matters is on somewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

import pytest
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 512
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
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
_BARE_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "truncate": False,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
_COMMON: Mapping[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "eos_token_id": VOCAB_SIZE - 1,
    "bos_token_id": 0,
}
_GQA: Mapping[str, object] = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16}
_QWEN3_MOE: Mapping[str, object] = {
    **_GQA,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 40,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}
_DEEPSEEK: Mapping[str, object] = {
    **_COMMON,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
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
}
_V2 = {**_DEEPSEEK, "num_hidden_layers": 2, "routed_scaling_factor": 2.0}
INDEX_TOPK = 16  # of the "deepseek-v32" families: most of a run is sparse
_V32 = {**_DEEPSEEK, "index_topk": INDEX_TOPK, "index_n_heads": 16, "index_head_dim": 24}
# Wider than a block of 128, and no multiple of it.
_WIDE = {
    "num_hidden_layers": 2,
    "hidden_size": 160,
    "intermediate_size": 288,
    "moe_intermediate_size": 136,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 144,
    "q_lora_rank": 136,
}


def _build(
    model: type[PreTrainedModel], config: type[PreTrainedConfig], settings: Mapping[str, object], **changes: object
) -> PreTrainedModel:
    return model(config(**{**settings, **changes}))  # pyright: ignore[reportArgumentType]


_llama = partial(_build, LlamaForCausalLM, LlamaConfig, _GQA)
_qwen2 = partial(_build, Qwen2ForCausalLM, Qwen2Config, _GQA)
_qwen3 = partial(_build, Qwen3ForCausalLM, Qwen3Config, _GQA)
_qwen3_moe = partial(_build, Qwen3MoeForCausalLM, Qwen3MoeConfig, _QWEN3_MOE)
_deepseek_v2 = partial(_build, DeepseekV2ForCausalLM, DeepseekV2Config, _V2)
_deepseek_v3 = partial(_build, DeepseekV3ForCausalLM, DeepseekV3Config, _DEEPSEEK)
_deepseek_v32 = partial(_build, DeepseekV32ForCausalLM, DeepseekV32Config, _V32)

FAMILIES: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama-mha-bias": partial(_llama, num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "llama3-tied": partial(_llama, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, num_key_value_heads=1),
    "llama-linear": partial(_llama, rope_parameters=_LINEAR_ROPE),
    "llama-yarn": partial(_llama, rope_parameters=_BARE_YARN_ROPE),
    "qwen2": _qwen2,
    "qwen3": partial(_qwen3, head_dim=24, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3-tied-bias": partial(_qwen3, tie_word_embeddings=True, attention_bias=True, rope_parameters=YARN_ROPE),
    "qwen3-moe": partial(_qwen3_moe, mlp_only_layers=[1]),
    "qwen3-moe-normalized": partial(_qwen3_moe, norm_topk_prob=True, decoder_sparse_step=2, tie_word_embeddings=True),
    "deepseek-v2": partial(_deepseek_v2, topk_method="group_limited_greedy", rope_parameters=YARN_ROPE),
    "deepseek-v2-lite": partial(
        _deepseek_v2, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1, mlp_bias=True
    ),
    "deepseek-v3": _deepseek_v3,
    "deepseek-v3-yarn": partial(
        _deepseek_v3, rope_parameters=YARN_ROPE, norm_topk_prob=False, tie_word_embeddings=True
    ),
    "deepseek-v3-lite": partial(_deepseek_v3, q_lora_rank=None),  # queries without a latent
    "deepseek-v3-wide": partial(_deepseek_v3, **_WIDE),
    "deepseek-v32": _deepseek_v32,
    "deepseek-v32-yarn": partial(_deepseek_v32, rope_parameters=YARN_ROPE, attention_bias=True),
}

# One of each family that is served, for tests that start processes.
_SERVED = (
    "llama",
    "llama3-tied",
    "qwen2",
    "qwen3",
    "qwen3-moe",
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-v3-yarn",
    "deepseek-v3-wide-fp8",
    "deepseek-v32",
)


def served(short: Collection[str]) -> list[object]:
    """Parameters of a test: all families in the long form, `short` ones always."""
    return [pytest.param(family, marks=() if family in short else pytest.mark.full) for family in _SERVED]

"""Tiny shapes of every model family, as transformers builds them; each setting that matters is on somewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

import pytest
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.bart.configuration_bart import BartConfig
from transformers.models.bart.modeling_bart import BartForConditionalGeneration
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32ForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mbart.configuration_mbart import MBartConfig
from transformers.models.mbart.modeling_mbart import MBartForConditionalGeneration
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration

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


_T5: Mapping[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 64,
    "d_kv": 24,  # heads are wider than the hidden size holds
    "d_ff": 160,
    "num_layers": 3,
    "num_decoder_layers": 2,  # fewer: the cache of transformers' generate is sized by the encoder
    "num_heads": 4,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 40,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": VOCAB_SIZE - 1,
}
_BART: Mapping[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 160,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 200,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": VOCAB_SIZE - 1,
}
_T5_SMALL: Mapping[str, object] = {  # the published shape, but for the vocabulary
    **_T5,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
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

_t5 = partial(_build, T5ForConditionalGeneration, T5Config, _T5)
_bart = partial(_build, BartForConditionalGeneration, BartConfig, _BART)
_mbart = partial(_build, MBartForConditionalGeneration, MBartConfig, _BART)

ENCODER_DECODERS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "t5": _t5,
    "t5-gated": partial(_t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5-small": partial(_build, T5ForConditionalGeneration, T5Config, _T5_SMALL),
    "bart": partial(_bart, scale_embedding=True),
    "bart-relu": partial(_bart, activation_function="relu", encoder_attention_heads=2),
    "mbart": partial(_mbart, scale_embedding=True, activation_function="gelu_new"),
}
FAMILIES: Mapping[str, Callable[[], PreTrainedModel]] = {
    **ENCODER_DECODERS,
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

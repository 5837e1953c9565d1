"""What config.json says, in the spellings that published checkpoints use, and what is refused by name."""

from pathlib import Path
from typing import TypeVar

import pytest

from cluster.errors import CheckpointError
from workers.layers.mla import IndexerShape
from workers.layers.rotary import LinearScaling, Llama3Scaling, YarnScaling
from workers.models.deepseek_config import DeepseekConfig
from workers.models.encoder_decoder import EncoderDecoderModel
from workers.models.fields import ConfigFields
from workers.models.grouped_query import GqaConfig
from workers.models.registry import MODELS
from workers.models.rope import Rope, read_rope

PATH = Path("somewhere/config.json")
_BOOKKEEPING: dict[str, object] = {
    "_name_or_path": "elsewhere",
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
_DENSE: dict[str, object] = {
    **_BOOKKEEPING,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LLAMA_3_1: dict[str, object] = {
    **_DENSE,
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
QWEN_2: dict[str, object] = {
    **_DENSE,
    "max_window_layers": 28,
    "sliding_window": 131072,
    "use_mrope": False,
    "use_sliding_window": False,
}
QWEN_3: dict[str, object] = {
    **_DENSE,
    "attention_bias": False,
    "head_dim": 128,
    "max_window_layers": 36,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
}
QWEN_3_MOE: dict[str, object] = {
    **QWEN_3,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
_LATENT: dict[str, object] = {
    **_BOOKKEEPING,
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration.Config"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
}
DEEPSEEK_V2_LITE: dict[str, object] = {
    **_LATENT,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
DEEPSEEK_V3: dict[str, object] = {
    **_LATENT,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
PUBLISHED = {
    "LlamaForCausalLM": LLAMA_3_1,
    "Qwen2ForCausalLM": QWEN_2,
    "Qwen3ForCausalLM": QWEN_3,
    "Qwen3MoeForCausalLM": QWEN_3_MOE,
    "DeepseekV2ForCausalLM": DEEPSEEK_V2_LITE,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "DeepseekV32ForCausalLM": {**DEEPSEEK_V3, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048},
}


ConfigT = TypeVar("ConfigT", GqaConfig, DeepseekConfig)


def read(architecture: str, **changes: object) -> GqaConfig | DeepseekConfig:
    model_class = MODELS[architecture]
    assert not issubclass(model_class, EncoderDecoderModel)
    return model_class.read(ConfigFields(PATH, {**PUBLISHED[architecture], **changes}))


def published(architecture: str, kind: type[ConfigT]) -> ConfigT:
    config = read(architecture)
    assert isinstance(config, kind)
    return config


def refusal(architecture: str, **changes: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(architecture, **changes)
    return str(caught.value)


def test_every_architecture_is_here() -> None:
    decoders = {name for name, model_class in MODELS.items() if not issubclass(model_class, EncoderDecoderModel)}
    assert PUBLISHED.keys() == decoders


def test_published_values_arrive() -> None:
    names = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
    llama, qwen, moe = (published(name, GqaConfig) for name in names)
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    assert llama.decoder.rope == Rope(500000.0, scaling, 1.0)
    assert (llama.attention.head_dim, llama.attention.norm_eps, qwen.attention.norm_eps) == (128, None, 1e-05)
    assert moe.decoder.experts is not None
    assert moe.decoder.experts.routing.normalize and moe.decoder.experts.routing.scoring == "softmax"
    assert all(moe.decoder.sparse_layers) and not any(qwen.decoder.sparse_layers)
    lite, v3, v32 = (published(f"DeepseekV{version}ForCausalLM", DeepseekConfig) for version in ("2", "3", "32"))
    assert lite.decoder.experts is not None and v3.decoder.experts is not None
    assert (lite.attention.query_latent_size, lite.decoder.experts.routing.max_groups) == (None, 1)
    assert v3.decoder.sparse_layers == (False,) * 3 + (True,) * 58
    assert (v3.decoder.experts.routing.balanced, v3.decoder.num_draft_layers) == (True, 1)
    assert v3.attention.scale == pytest.approx(192**-0.5 * 1.3688879454113936**2)  # 0.1 ln 40 + 1
    assert v3.attention.indexer is None and v32.attention.indexer == IndexerShape(num_heads=64, head_dim=128, topk=2048)


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_a_setting_that_nobody_reads_is_refused(architecture: str) -> None:
    message = refusal(architecture, logit_scale=0.5)
    assert f"{PATH}: logit_scale = 0.5; no such setting is computed" in message and "remove it" in message
    read(architecture, logit_scale=None)
    assert "is_encoder_decoder = True; only false is computed" in refusal(architecture, is_encoder_decoder=True)
    assert "rope_parameters.spin = 2" in refusal(architecture, rope_scaling=None, rope_parameters={"spin": 2})
    assert "hidden_act = 'gelu'; only \"silu\" is computed" in refusal(architecture, hidden_act="gelu")


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_what_is_needed_is_named(architecture: str) -> None:
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"):
        assert f"{PATH}: {key} = None; must be an integer >= 1" in refusal(architecture, **{key: None})


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("Qwen2ForCausalLM", {"use_mrope": True}, "use_mrope = True; only false"),
        ("Qwen2ForCausalLM", {"attention_bias": False}, "attention_bias = False; no such setting"),
        ("Qwen3ForCausalLM", {"use_sliding_window": True}, "use_sliding_window = True; only false"),
        ("Qwen3ForCausalLM", {"layer_types": ["sliding_attention"]}, "only full_attention"),
        ("Qwen3ForCausalLM", {"head_dim": None, "hidden_size": 4100}, "hidden_size = 4100; must be a multiple"),
        ("Qwen3MoeForCausalLM", {"num_experts": None}, "num_experts = None"),
        ("Qwen3MoeForCausalLM", {"num_local_experts": 64}, "num_local_experts = 64; num_experts = 128 says"),
        ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 129}, "num_experts_per_tok = 129; must be at most"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [32]}, "mlp_only_layers = [32]; must be below"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": ["x"]}, "must be a list of integers"),
        ("DeepseekV2ForCausalLM", {"scoring_func": "sigmoid"}, 'only "softmax" is computed'),
        ("DeepseekV2ForCausalLM", {"topk_method": "noaux_tc"}, "greedy or group_limited_greedy"),
        ("DeepseekV2ForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob = True; only false"),
        ("DeepseekV2ForCausalLM", {"topk_method": "group_limited_greedy", "n_group": None}, "n_group = None"),
        ("DeepseekV3ForCausalLM", {"index_topk": 2048}, "index_topk = 2048; no such setting"),
        ("DeepseekV3ForCausalLM", {"routed_scaling_factor": None}, "routed_scaling_factor = None"),
        ("LlamaForCausalLM", {"per_layer_config": {"0": {}}}, "per_layer_config"),
    ],
)
def test_what_is_not_computed_is_refused(architecture: str, changes: dict[str, object], message: str) -> None:
    assert message in refusal(architecture, **changes)


def rope(**fields: object) -> Rope:
    return read_rope(ConfigFields(PATH, {"max_position_embeddings": 256, **fields}))


def test_rope_in_both_spellings() -> None:
    linear = Rope(7.0, LinearScaling(factor=2.0), 1.0)
    assert rope(rope_theta=7, rope_scaling={"type": "linear", "factor": 2}) == linear
    assert rope(rope_parameters={"rope_type": "linear", "rope_theta": 7, "factor": 2.0}) == linear
    assert rope() == rope(rope_parameters={"rope_theta": 10000.0}) == Rope(10000.0, None, 1.0)
    yarn = rope(rope_scaling={"rope_type": "yarn", "type": "yarn", "original_max_position_embeddings": 64}).scaling
    assert isinstance(yarn, YarnScaling) and (yarn.factor, yarn.beta_fast, yarn.beta_slow) == (4.0, 32.0, 1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "change with the length of the text"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "change with the length of the text"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor = None"),
        ({"rope_parameters": {"rope_type": "default", "type": "yarn"}}, "rope_parameters.type = 'yarn'; only"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5; only 1.0 is computed"),
        ({"rope_parameters": {"mscale": 1.0}}, "rope_parameters.mscale = 1.0; no such setting"),
        ({"rope_parameters": {}, "rope_scaling": {"type": "linear"}}, "keep one of the two"),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 1,
                    "original_max_position_embeddings": 64,
                }
            },
            "high_freq_factor = 1; must be above low_freq_factor = 4",
        ),
    ],
)
def test_rope_that_is_not_computed(fields: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        rope(**fields)
    assert message in str(caught.value)

"""config.json of encoder–decoders, in the spellings of published checkpoints, and what is refused by name."""

from pathlib import Path

import pytest
import torch

from cluster.errors import CheckpointError
from workers.models.bart import BartForConditionalGeneration, MBartForConditionalGeneration
from workers.models.encoder_decoder import EncoderDecoderModel, ForcedTokens
from workers.models.fields import ConfigFields
from workers.models.registry import MODELS
from workers.models.t5 import T5ForConditionalGeneration

PATH = Path("somewhere/config.json")
T5_SMALL: dict[str, object] = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 2048,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_heads": 8,
    "num_layers": 6,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "task_specific_params": {"summarization": {"num_beams": 4}},
    "vocab_size": 32128,
}
FLAN_T5: dict[str, object] = {
    **T5_SMALL,
    "d_ff": 1024,
    "feed_forward_proj": "gated-gelu",
    "num_decoder_layers": 8,
    "num_heads": 6,
    "num_layers": 8,
    "relative_attention_max_distance": 128,
    "tie_word_embeddings": False,
    "use_cache": True,
}
BART_LARGE_CNN: dict[str, object] = {
    "_num_labels": 3,
    "activation_dropout": 0.0,
    "activation_function": "gelu",
    "add_final_layer_norm": False,
    "architectures": ["BartForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "classif_dropout": 0.0,
    "classifier_dropout": 0.0,
    "d_model": 1024,
    "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 12,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "early_stopping": True,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 12,
    "eos_token_id": 2,
    "force_bos_token_to_be_generated": True,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "gradient_checkpointing": False,
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "length_penalty": 2.0,
    "max_length": 142,
    "max_position_embeddings": 1024,
    "model_type": "bart",
    "no_repeat_ngram_size": 3,
    "normalize_before": False,
    "num_beams": 4,
    "num_hidden_layers": 12,
    "output_past": True,
    "pad_token_id": 1,
    "scale_embedding": False,
    "vocab_size": 50264,
}
MBART_50: dict[str, object] = {
    **BART_LARGE_CNN,
    "activation_function": "relu",
    "add_bias_logits": False,
    "add_final_layer_norm": True,
    "architectures": ["MBartForConditionalGeneration"],
    "model_type": "mbart",
    "normalize_before": True,
    "normalize_embedding": True,
    "scale_embedding": True,
    "static_position_embeddings": False,
    "tokenizer_class": "MBart50Tokenizer",
    "vocab_size": 250054,
}
PUBLISHED = {
    "BartForConditionalGeneration": BART_LARGE_CNN,
    "MBartForConditionalGeneration": MBART_50,
    "T5ForConditionalGeneration": T5_SMALL,
}
NOTHING_FORCED = ForcedTokens(0, None, None)


def read(
    architecture: str, config: dict[str, object], *, dtype: str = "bfloat16", forced: ForcedTokens = NOTHING_FORCED
) -> EncoderDecoderModel:
    model_class = MODELS[architecture]
    assert issubclass(model_class, EncoderDecoderModel)
    with torch.device("meta"):
        return model_class.from_fields(
            ConfigFields(PATH, config), architecture=architecture, dtype=dtype, eos_token_ids=(1,), forced=forced
        )


def refusal(architecture: str, changes: dict[str, object], *, dtype: str = "bfloat16") -> str:
    with pytest.raises(CheckpointError) as caught:
        read(architecture, {**PUBLISHED[architecture], **changes}, dtype=dtype)
    return str(caught.value)


def test_every_architecture_is_here() -> None:
    known = {name for name, model_class in MODELS.items() if issubclass(model_class, EncoderDecoderModel)}
    assert PUBLISHED.keys() == known


def test_published_values_arrive() -> None:
    small, flan = (read("T5ForConditionalGeneration", config) for config in (T5_SMALL, FLAN_T5))
    assert isinstance(small, T5ForConditionalGeneration) and isinstance(flan, T5ForConditionalGeneration)
    assert (small.config.is_gated, flan.config.is_gated) == (False, True)
    assert (small.config.output_scale, flan.config.output_scale) == (512**-0.5, 1.0)
    assert (small.config.max_distance, small.config.shape.scale) == (128, 1.0)
    assert sum(parameter.numel() for parameter in small.parameters()) == 60_506_624 + 32128 * 512  # and the head
    cnn, mbart = (
        read(name, PUBLISHED[name], forced=ForcedTokens(2, 0, 2))
        for name in ("BartForConditionalGeneration", "MBartForConditionalGeneration")
    )
    assert isinstance(cnn, BartForConditionalGeneration) and isinstance(mbart, MBartForConditionalGeneration)
    assert cnn.spec.encoder is not None
    assert (cnn.spec.encoder.max_source_tokens, cnn.spec.encoder.forced_bos_token_id) == (1024, 0)
    assert sum(parameter.numel() for parameter in cnn.parameters()) == 406_290_432 + 50264
    names = {name for name, _ in mbart.named_parameters()}
    assert "model.decoder.layer_norm.bias" in names and "model.encoder.embed_positions.weight" in names
    assert "model.decoder.layer_norm.bias" not in dict(cnn.named_parameters())


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-silu"}, "relu and gated-gelu are computed"),
        ("T5ForConditionalGeneration", {"relative_attention_num_buckets": 30}, "must be a multiple of 4"),
        ("T5ForConditionalGeneration", {"relative_attention_max_distance": 16}, "must be over half of 32 buckets"),
        ("T5ForConditionalGeneration", {"is_encoder_decoder": False}, "is_encoder_decoder = False; only true"),
        ("T5ForConditionalGeneration", {"logit_scale": 2}, "logit_scale = 2; no such setting is computed"),
        ("T5ForConditionalGeneration", {"d_kv": None}, "d_kv = None; must be an integer >= 1"),
        ("BartForConditionalGeneration", {"activation_function": "mish"}, "relu, gelu, gelu_new, silu, swish are"),
        ("BartForConditionalGeneration", {"normalize_before": True}, "normalize_before = True; only false"),
        ("MBartForConditionalGeneration", {"normalize_before": False}, "normalize_before = False; only true"),
        ("BartForConditionalGeneration", {"decoder_attention_heads": 3}, "must divide d_model = 1024"),
        ("BartForConditionalGeneration", {"tie_word_embeddings": False}, "only true is computed: the head"),
        ("MBartForConditionalGeneration", {"static_position_embeddings": True}, "positions are learned"),
    ],
)
def test_what_is_not_computed_is_refused(architecture: str, changes: dict[str, object], message: str) -> None:
    refused = refusal(architecture, changes)
    assert message in refused and f"{PATH}: " in refused


def test_t5_in_float16_is_refused_with_the_reason() -> None:
    message = refusal("T5ForConditionalGeneration", {}, dtype="float16")
    assert "activations pass what float16 can hold; set model.dtype to bfloat16 or float32" in message


def test_a_decoder_that_begins_with_nothing_is_refused() -> None:
    with pytest.raises(CheckpointError, match="decoder_start_token_id = None; a decoder begins with it"):
        read(
            "MBartForConditionalGeneration",
            {**MBART_50, "decoder_start_token_id": None},
            forced=ForcedTokens(None, None, None),
        )

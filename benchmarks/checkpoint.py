"""A Llama of some millions of parameters as a directory that workers can load: its weights are drawn when loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

SHAPE: Mapping[str, int] = MappingProxyType(
    {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    }
)
TINY: Mapping[str, int] = MappingProxyType(
    {**SHAPE, "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
)


def write(directory: Path, shape: Mapping[str, int] = SHAPE) -> Path:
    """Only config.json: serve it with model.load_format=dummy. There is no end token, and no tokenizer."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        **shape,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def describe(shape: Mapping[str, int]) -> str:
    return f"Llama of {num_parameters(shape) / 1e6:.1f} M parameters, {shape['num_hidden_layers']} layers, fp32, random"


def num_parameters(shape: Mapping[str, int]) -> int:
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    kv_width = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * width * width + 2 * width * kv_width + 3 * width * inner
    return layer * shape["num_hidden_layers"] + 2 * shape["vocab_size"] * width

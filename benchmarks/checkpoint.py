"""A Llama of some millions of parameters as a directory that workers can load: its weights are drawn when loaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Shape:
    """Named as config.json names them."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    max_position_embeddings: int = 2048

    @property
    def num_parameters(self) -> int:
        width = self.hidden_size
        kv_width = width * self.num_key_value_heads // self.num_attention_heads
        layer = 2 * width * width + 2 * width * kv_width + 3 * width * self.intermediate_size
        return layer * self.num_hidden_layers + 2 * self.vocab_size * width

    def __str__(self) -> str:
        return f"Llama of {self.num_parameters / 1e6:.1f} M parameters, {self.num_hidden_layers} layers, fp32, random"


SMALL = Shape()
TINY = replace(SMALL, vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2)


def write(directory: Path, shape: Shape = SMALL) -> Path:
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
        **asdict(shape),
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory

"""From the architecture that config.json names to the class that computes it."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from cluster.errors import CheckpointError
from workers.models.deepseek import DeepseekForCausalLM
from workers.models.llama import LlamaForCausalLM

ModelClass: TypeAlias = type[LlamaForCausalLM] | type[DeepseekForCausalLM]

MODELS: dict[str, ModelClass] = {
    "DeepseekV3ForCausalLM": DeepseekForCausalLM,
    "DeepseekV32ForCausalLM": DeepseekForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
}


def find_model(architectures: object, path: Path) -> tuple[str, ModelClass]:
    """The first known name of config.json's `architectures`. Raises CheckpointError naming `path` and what is known."""
    if isinstance(architectures, list):
        for name in architectures:
            if name in MODELS:
                return name, MODELS[name]
    raise CheckpointError(f"{path}: architectures = {architectures!r}; known are {', '.join(MODELS)}")

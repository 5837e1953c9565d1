"""From the architecture that config.json names to the class that computes it."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from cluster.errors import CheckpointError
from workers.models.bart import BartForConditionalGeneration, MBartForConditionalGeneration
from workers.models.deepseek import (
    DeepseekForCausalLM,
    DeepseekV2ForCausalLM,
    DeepseekV3ForCausalLM,
    DeepseekV32ForCausalLM,
)
from workers.models.encoder_decoder import EncoderDecoderModel
from workers.models.grouped_query import GqaForCausalLM
from workers.models.llama import LlamaForCausalLM
from workers.models.qwen import Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM
from workers.models.t5 import T5ForConditionalGeneration

ModelClass: TypeAlias = type[GqaForCausalLM] | type[DeepseekForCausalLM] | type[EncoderDecoderModel]

MODELS: dict[str, ModelClass] = {
    "BartForConditionalGeneration": BartForConditionalGeneration,
    "DeepseekV2ForCausalLM": DeepseekV2ForCausalLM,
    "DeepseekV3ForCausalLM": DeepseekV3ForCausalLM,
    "DeepseekV32ForCausalLM": DeepseekV32ForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
    "MBartForConditionalGeneration": MBartForConditionalGeneration,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
    "T5ForConditionalGeneration": T5ForConditionalGeneration,
}


def find_model(architectures: object, path: Path) -> tuple[str, ModelClass]:
    """The first known name of config.json's `architectures`. Raises CheckpointError naming `path` and what is known."""
    if isinstance(architectures, list):
        for name in architectures:
            if name in MODELS:
                return name, MODELS[name]
    raise CheckpointError(f"{path}: architectures = {architectures!r}; known are {', '.join(MODELS)}")

"""A worker whose model fails on prompts that contain a magic run of tokens. The product knows nothing of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from multiprocessing.connection import Connection

from torch import Tensor

from cluster.config import SluiceConfig
from tests.support import plain_cluster
from workers.attention.interface import AttentionBatch
from workers.models import registry
from workers.models.llama import LlamaForCausalLM

_TOKEN = 7  # four in a row, then one that says what happens; no random prompt holds that
RAISES = (_TOKEN, _TOKEN, _TOKEN, _TOKEN, 1)
CRASHES = (_TOKEN, _TOKEN, _TOKEN, _TOKEN, 2)  # the engine's loop
DIES = (_TOKEN, _TOKEN, _TOKEN, _TOKEN, 3)  # the process, without a word
DEAD = 71


class LoopCrash(BaseException):
    """Nothing that a step may catch."""


class FaultyLlama(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, batch: AttentionBatch, capture_layers: Sequence[int] = ()) -> Tensor:
        text = " ".join(map(str, input_ids.tolist()))
        if _said(text, RAISES):
            raise FloatingPointError("a kernel failed")
        if _said(text, CRASHES):
            raise LoopCrash
        if _said(text, DIES):
            os._exit(DEAD)
        return super().forward(input_ids, batch, capture_layers)


def _said(text: str, run: tuple[int, ...]) -> bool:
    return f" {' '.join(map(str, run))} " in f" {text} "


def serve(config: SluiceConfig, pool: str, name: str, pipe: Connection) -> None:
    """In the worker's process."""
    registry.MODELS["LlamaForCausalLM"] = FaultyLlama
    plain_cluster.serve(config, pool, name, pipe)

"""Decode steps over the inputs of a graph, computed anew in each step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from workers.attention.interface import AttentionBatch
from workers.engine.cuda_graph import StaticInputs
from workers.engine.model_runner import StepModel


class UnreplayedModel:
    """As a GraphedModel of these sizes."""

    def __init__(self, model: StepModel, static: StaticInputs, sizes: Sequence[int]) -> None:
        self._model, self._static, self._sizes = model, static, sizes
        self.padded: list[tuple[int, int]] = []  # sequences of each step, and what it was padded to

    def forward(self, input_ids: Tensor, batch: AttentionBatch, capture_layers: Sequence[int] = ()) -> Tensor:
        count = batch.num_sequences
        if batch.num_decodes < count:
            return self._model.forward(input_ids, batch, capture_layers)
        size = next(size for size in self._sizes if size >= count)
        self.padded.append((count, size))
        self._static.fill(input_ids, batch, size)
        return self._model.forward(*self._static.batch(size))[:count]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)

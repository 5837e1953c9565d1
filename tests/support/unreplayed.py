"""Steps over the inputs of a graph, computed anew in each step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from workers.attention.interface import AttentionBatch
from workers.engine.model_runner import StepModel
from workers.engine.static_inputs import StaticInputs


class UnreplayedModel:
    """As a GraphedModel of these sizes."""

    def __init__(
        self, model: StepModel, static: StaticInputs, sizes: Sequence[int], prompt_sizes: Sequence[int] = ()
    ) -> None:
        self._model, self._static, self._sizes, self._prompt_sizes = model, static, sizes, prompt_sizes
        self.padded: list[tuple[int, int]] = []  # sequences of each step of single tokens, and what it was padded to
        self.padded_prompts: list[tuple[int, int]] = []  # tokens of each other step, and the same

    def forward(self, input_ids: Tensor, batch: AttentionBatch, capture_layers: Sequence[int] = ()) -> Tensor:
        count = batch.num_sequences
        if batch.num_decodes < count:
            if batch.num_tokens > max(self._prompt_sizes, default=0):
                return self._model.forward(input_ids, batch, capture_layers)
            size = next(size for size in self._prompt_sizes if size >= batch.num_tokens)
            self.padded_prompts.append((batch.num_tokens, size))
            self._static.fill_prompts(input_ids, batch, size)
            return self._model.forward(*self._static.prompts_batch(size))[: batch.num_tokens]
        size = next(size for size in self._sizes if size >= count)
        self.padded.append((count, size))
        self._static.fill(input_ids, batch, size)
        return self._model.forward(*self._static.batch(size))[:count]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)

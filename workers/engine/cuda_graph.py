"""Steps as CUDA graphs, one launch for a whole step: of single tokens at a few numbers of sequences, and, where
attention reads all lengths on the device, with prompts at a few numbers of tokens.

A step is padded to the next captured size (static_inputs.py). All graphs share one memory pool and the inputs; what a
replay returns is valid until the next.

Shapes: T tokens, P the size that a step is padded to, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from workers.attention.interface import AttentionBatch
from workers.engine.model_runner import StepModel
from workers.engine.static_inputs import StaticInputs

_MOST_PROMPT_TOKENS = 4096  # a step of more keeps the device busy for longer than its launches take


def default_sizes(max_sequences: int, *, least_step: int = 1) -> list[int]:
    """No step is padded by more than an eighth, for padding has experts of its own: each up to 16, every 2 up to 32,
    every 4 up to 64 and so on, the last one at least `max_sequences`.

    least_step: from there on; a power of two, more than one where each size costs more than its graph.
    """
    sizes = [1]
    while sizes[-1] < max_sequences:
        step = max(1, (1 << sizes[-1].bit_length()) // 16)
        sizes.append(sizes[-1] + (step if sizes[-1] < least_step else max(step, least_step)))
    return sizes


def default_prompt_sizes(max_tokens: int) -> list[int]:
    """Every 64 up to 1024, every 128 up to 2048, every 256 beyond; the last one at least `max_tokens`, or 4096."""
    sizes = [64]
    while sizes[-1] < min(max_tokens, _MOST_PROMPT_TOKENS):
        sizes.append(sizes[-1] + max(64, 1 << (sizes[-1].bit_length() - 4)))
    return sizes


def static_bytes(sizes: Sequence[int], hidden_size: int, vocab_size: int, dtype: torch.dtype) -> int:
    """What the results of all graphs of single tokens hold for good, about."""
    return sum(sizes) * (hidden_size + vocab_size) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    hidden: Tensor  # [P, d]
    logits: Tensor  # [P, V]


class GraphedModel:
    """A `StepModel` whose steps are replayed. One growing group, one thread, one stream.

    sizes, prompt_sizes: numbers of sequences of one token each, and of tokens of steps with prompts, of as many
    sequences at most; the model reads `AttentionBatch.spans` for these. max_blocks, max_fixed_blocks: see StaticInputs.
    dense_context: steps whose contexts are no longer have graphs of their own, of another form than the others'.
    Capturing runs every graph twice before; do it before the pool is in use.
    """

    def __init__(
        self,
        model: StepModel,
        sizes: Sequence[int],
        max_blocks: int,
        device: torch.device,
        *,
        dense_context: int | None = None,
        max_fixed_blocks: Sequence[int] = (),
        prompt_sizes: Sequence[int] = (),
    ) -> None:
        self._model = model
        self._sizes, self._prompt_sizes = sorted(sizes), sorted(prompt_sizes)
        most = max(prompt_sizes, default=0)
        self._static = StaticInputs(self._sizes[-1], max_blocks, device, max_fixed_blocks, max_tokens=most)
        self._dense_context = dense_context
        self._captured: dict[tuple[int, bool], _Captured] = {}  # by size, and whether a context is beyond dense_context
        self._prompts: dict[int, torch.cuda.CUDAGraph] = {}
        self._hidden: Tensor | None = None  # [most tokens, d]: where steps with prompts leave theirs
        self._last: tuple[Tensor, Tensor] | None = None  # hidden states of the last replay, and their logits

    @torch.inference_mode()
    def capture(self) -> None:
        """Largest first, so that the smaller ones fit into its memory."""
        pool = torch.cuda.graph_pool_handle()
        forms = [False] if self._dense_context is None else [False, True]
        for size, beyond in product(reversed(self._sizes), forms):
            input_ids, batch = self._static.batch(size, 1 + (self._dense_context or 0) if beyond else 1)
            for _ in range(2):  # compiles, and fills caches that must not be filled while capturing
                self._model.logits(self._model.forward(input_ids, batch))
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                hidden = self._model.forward(input_ids, batch)
                logits = self._model.logits(hidden)
            self._captured[size, beyond] = _Captured(graph, hidden, logits)
        for size in reversed(self._prompt_sizes):
            input_ids, batch = self._static.prompts_batch(size)
            first = self._model.forward(input_ids, batch)
            self._model.forward(input_ids, batch)
            left = self._hidden = first if self._hidden is None else self._hidden
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                left[:size].copy_(self._model.forward(input_ids, batch))
            self._prompts[size] = graph

    def forward(self, input_ids: Tensor, batch: AttentionBatch, capture_layers: Sequence[int] = ()) -> Tensor:
        self._last = None
        size = self.padded_size(batch)
        if capture_layers or (size is None and not self._replays_prompts(batch)):
            return self._model.forward(input_ids, batch, capture_layers)
        if size is None:
            return self._forward_prompts(input_ids, batch)
        self._static.fill(input_ids, batch, size)
        beyond = self._dense_context is not None and max(batch.context_lens) > self._dense_context
        captured = self._captured[size, beyond]
        captured.graph.replay()
        count = batch.num_sequences
        hidden = captured.hidden[:count]
        self._last = (hidden, captured.logits[:count])
        return hidden

    def _replays_prompts(self, batch: AttentionBatch) -> bool:
        most = self._prompt_sizes[-1] if self._prompt_sizes else 0
        return batch.num_tokens <= most and batch.num_sequences <= self._sizes[-1]

    def _forward_prompts(self, input_ids: Tensor, batch: AttentionBatch) -> Tensor:
        size = next(size for size in self._prompt_sizes if size >= batch.num_tokens)
        self._static.fill_prompts(input_ids, batch, size)
        self._prompts[size].replay()
        assert self._hidden is not None
        return self._hidden[: batch.num_tokens]

    def logits(self, hidden: Tensor) -> Tensor:
        """Those of a replay are there already."""
        if self._last is not None and hidden is self._last[0]:
            return self._last[1]
        return self._model.logits(hidden)

    def padded_size(self, batch: AttentionBatch) -> int | None:
        """The captured size that a step of single tokens runs at; None: it runs without a graph."""
        if batch.num_decodes < batch.num_sequences or batch.num_sequences > self._sizes[-1]:
            return None
        return next(size for size in self._sizes if size >= batch.num_sequences)

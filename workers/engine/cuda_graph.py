"""Decode steps as CUDA graphs: one launch for a whole step of single tokens, at a few batch sizes.

A step is padded to the next captured size. Padding rows are token 0 at position 0 and write to the null block; of a
fixed group they read its first slot. All graphs share one memory pool and the inputs, which are allocated once; what a
replay returns is valid until the next.

Shapes: B sequences with one token each, P the size they are padded to, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from workers.attention.interface import AttentionBatch, FixedGroupMetadata, GroupMetadata
from workers.engine.model_runner import StepModel


def default_sizes(max_sequences: int) -> list[int]:
    """1, 2, 4, 8, then every 8 up to 128 and every 16 beyond, the last one at least `max_sequences`."""
    sizes = [1, 2, 4]
    while sizes[-1] < max_sequences:
        sizes.append(sizes[-1] + (4 if sizes[-1] < 8 else 8 if sizes[-1] < 128 else 16))
    return [size for size in sizes if size < max_sequences] + [next(s for s in sizes if s >= max_sequences)]


def static_bytes(sizes: Sequence[int], hidden_size: int, vocab_size: int, dtype: torch.dtype) -> int:
    """What the results of all graphs hold for good, about."""
    return sum(sizes) * (hidden_size + vocab_size) * dtype.itemsize


class StaticInputs:
    """Where decode steps of up to `largest` sequences are read from, whatever they are: tensors that are allocated once
    and filled for each step. One growing group, and any number of fixed ones.

    max_blocks, max_fixed_blocks: of the longest sequence, and of the longest extent in each fixed group.
    """

    def __init__(
        self, largest: int, max_blocks: int, device: torch.device, max_fixed_blocks: Sequence[int] = ()
    ) -> None:
        ints = {"dtype": torch.int64, "device": device}
        self._input_ids = torch.zeros(largest, **ints)
        self._positions = torch.zeros(largest, **ints)
        self._slots = torch.zeros(largest, **ints)
        self._table = torch.zeros(largest, max_blocks, **ints)
        self._fixed_tables = [torch.zeros(largest, width, **ints) for width in max_fixed_blocks]
        self._fixed_lens = [torch.ones(largest, **ints) for _ in max_fixed_blocks]

    def fill(self, input_ids: Tensor, batch: AttentionBatch, size: int) -> None:
        """A step of single tokens, padded to `size` rows. Waits for nothing."""
        count, (group,) = batch.num_sequences, batch.groups
        rows = [
            (self._input_ids, input_ids, 0),
            (self._positions, batch.positions, 0),
            (self._slots, group.slot_mapping, 0),
            (self._table, group.block_table, 0),
        ]
        for table, lens, fixed in zip(self._fixed_tables, self._fixed_lens, batch.fixed, strict=True):
            rows += [(table, fixed.block_table, 0), (lens, fixed.lens_on_device(), 1)]
        for static, given, padding in rows:
            filled = static[:count] if given.dim() == 1 else static[:count, : given.shape[1]]
            filled.copy_(given)
            if count < size:
                static[count:size].fill_(padding)

    def batch(self, size: int, context: int = 1) -> tuple[Tensor, AttentionBatch]:
        """Token ids [size], and the step over them. What its host lists say of lengths is true of no step."""
        return self._input_ids[:size], AttentionBatch(
            num_sequences=size,
            num_decodes=size,
            query_lens=[1] * size,
            query_starts=list(range(size + 1)),
            context_lens=[context] * size,
            positions=self._positions[:size],
            groups=(GroupMetadata(self._table[:size], self._slots[:size]),),
            logits_rows=torch.arange(size, device=self._positions.device),
            fixed=tuple(
                FixedGroupMetadata(table[:size], [1] * size, lens[:size])
                for table, lens in zip(self._fixed_tables, self._fixed_lens, strict=True)
            ),
        )


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    hidden: Tensor  # [P, d]
    logits: Tensor  # [P, V]


class GraphedModel:
    """A `StepModel` whose decode steps are replayed. One growing group, one thread, one stream.

    max_blocks, max_fixed_blocks: see StaticInputs. dense_context: steps whose contexts are no longer have graphs of
    their own, of another form than the others'. Capturing runs every graph twice before; do it before the pool is in
    use.
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
    ) -> None:
        self._model = model
        self._sizes = sorted(sizes)
        self._static = StaticInputs(self._sizes[-1], max_blocks, device, max_fixed_blocks)
        self._dense_context = dense_context
        self._captured: dict[tuple[int, bool], _Captured] = {}  # by size, and whether a context is beyond dense_context
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

    def forward(self, input_ids: Tensor, batch: AttentionBatch, capture_layers: Sequence[int] = ()) -> Tensor:
        self._last = None
        size = self.padded_size(batch)
        if size is None or capture_layers:
            return self._model.forward(input_ids, batch, capture_layers)
        self._static.fill(input_ids, batch, size)
        beyond = self._dense_context is not None and max(batch.context_lens) > self._dense_context
        captured = self._captured[size, beyond]
        captured.graph.replay()
        count = batch.num_sequences
        hidden = captured.hidden[:count]
        self._last = (hidden, captured.logits[:count])
        return hidden

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

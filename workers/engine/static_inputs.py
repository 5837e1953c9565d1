"""Where steps that are replayed are read from: tensors that are allocated once and filled for each step.

A step is padded to the next size that was captured. Padding tokens are token 0 at position 0 and write to the null
block; padding sequences read the first slot of a fixed group.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from workers.attention.interface import AttentionBatch, FixedGroupMetadata, GroupMetadata


class StaticInputs:
    """Of steps of up to `max_sequences`, whatever they are, and `max_tokens`. One growing group, and any number of
    fixed ones.

    max_blocks, max_fixed_blocks: of the longest sequence, and of the longest extent in each fixed group.
    """

    def __init__(
        self,
        max_sequences: int,
        max_blocks: int,
        device: torch.device,
        max_fixed_blocks: Sequence[int] = (),
        *,
        max_tokens: int = 0,
    ) -> None:
        ints = {"dtype": torch.int64, "device": device}
        rows = max(max_sequences, max_tokens)
        self._input_ids = torch.zeros(rows, **ints)
        self._positions = torch.zeros(rows, **ints)
        self._slots = torch.zeros(rows, **ints)
        self._spans = torch.zeros(max_sequences, 2, **ints)
        self._table = torch.zeros(max_sequences, max_blocks, **ints)
        self._fixed_tables = [torch.zeros(max_sequences, width, **ints) for width in max_fixed_blocks]
        self._fixed_lens = [torch.ones(max_sequences, **ints) for _ in max_fixed_blocks]

    def fill(self, input_ids: Tensor, batch: AttentionBatch, size: int) -> None:
        """A step of single tokens, padded to `size` sequences. Waits for nothing."""
        self._fill_tokens(input_ids, batch, size)
        self._fill_sequences(batch, size)

    def fill_prompts(self, input_ids: Tensor, batch: AttentionBatch, size: int) -> None:
        """A step with prompts, padded to `size` tokens and to as many sequences as there may be. Waits for nothing."""
        self._fill_tokens(input_ids, batch, size)
        self._fill_sequences(batch, len(self._table))
        spans = torch.tensor([batch.query_starts[:-1], batch.query_lens]).t()
        _put(self._spans, spans.to(self._spans.device, non_blocking=True), len(self._spans), 0)

    def _fill_tokens(self, input_ids: Tensor, batch: AttentionBatch, size: int) -> None:
        (group,) = batch.groups
        for static, given in (
            (self._input_ids, input_ids),
            (self._positions, batch.positions),
            (self._slots, group.slot_mapping),
        ):
            _put(static, given, size, 0)

    def _fill_sequences(self, batch: AttentionBatch, size: int) -> None:
        (group,) = batch.groups
        _put(self._table, group.block_table, size, 0)
        for table, lens, fixed in zip(self._fixed_tables, self._fixed_lens, batch.fixed, strict=True):
            _put(table, fixed.block_table, size, 0)
            _put(lens, fixed.lens_on_device(), size, 1)

    def batch(self, size: int, context: int = 1) -> tuple[Tensor, AttentionBatch]:
        """Token ids [size], and the step over them: single tokens. What its host lists say of lengths is true of no
        step."""
        return self._batch(size, size, [1] * size, context, num_decodes=size)

    def prompts_batch(self, size: int) -> tuple[Tensor, AttentionBatch]:
        """The same of a step with prompts, whose `spans` count."""
        count = len(self._table)
        return self._batch(size, count, [0] * (count - 1) + [size], 1, num_decodes=0, spans=self._spans)

    def _batch(
        self,
        size: int,
        count: int,
        query_lens: list[int],
        context: int,
        *,
        num_decodes: int,
        spans: Tensor | None = None,
    ) -> tuple[Tensor, AttentionBatch]:
        return self._input_ids[:size], AttentionBatch(
            num_sequences=count,
            num_decodes=num_decodes,
            query_lens=query_lens,
            query_starts=[0, *accumulate(query_lens)],
            context_lens=[context] * count,
            positions=self._positions[:size],
            groups=(GroupMetadata(self._table[:count], self._slots[:size]),),
            logits_rows=torch.arange(count, device=self._positions.device),
            fixed=tuple(
                FixedGroupMetadata(table[:count], [1] * count, lens[:count])
                for table, lens in zip(self._fixed_tables, self._fixed_lens, strict=True)
            ),
            spans=spans,
        )


def _put(static: Tensor, given: Tensor, size: int, padding: int) -> None:
    """`given` [n] or [n, m] into the first rows of `static`, and padding behind it up to `size`."""
    count = len(given)
    filled = static[:count] if given.dim() == 1 else static[:count, : given.shape[1]]
    filled.copy_(given)
    if count < size:
        static[count:size].fill_(padding)

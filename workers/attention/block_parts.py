"""Single queries over K/V blocks where they lie, on a CPU: nothing is gathered.

A gather copies every block of every sequence in every layer, to read it once. Here blocks that stand side by side in
the pool are the batch of one call, and what the queries of a sequence saw in its blocks is merged by the sums of the
softmaxes (as attention/merging.py does for two parts). Sequences with equal tables are queries of the same blocks.

Shapes: B sequences, H heads (each with its own key and value), D head size, S block size, P parts: (sequence, block).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Run(NamedTuple):
    """Blocks first … end − 1, each read by the same number of queries, and no further than any of them sees."""

    first: int
    end: int
    extent: int  # E <= S: slots of each block
    queries: Tensor  # [blocks * sharing] rows of B
    mask: Tensor | None  # [blocks, H or 1, 1 or sharing, E]


class BlockParts:
    """One step, all layers; made from host values once."""

    def __init__(
        self,
        pages: Tensor,
        tables: Sequence[Sequence[int]],
        lens: Sequence[int],
        *,
        scale: float,
        bias: Tensor | None = None,
    ) -> None:
        """pages [blocks, layers, 2, H, S, D]. Of each sequence, its blocks (more than it needs are not read) and the
        tokens that its query sees, at least 1. `bias` [H, longest]: added to the score of the key that stands so far
        before the last one. Slots of a last block behind its tokens are read under a mask: they hold numbers."""
        self._pages, self._scale = pages, scale
        size = pages.shape[-2]
        sharers: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, (table, length) in enumerate(zip(tables, lens, strict=True)):
            alone = () if bias is None else (-row - 1,)  # what it adds depends on the query's own place
            sharers[(*alone, length, *table[: -(-length // size)])].append(row)
        by_count: defaultdict[int, list[tuple[int, int, list[int]]]] = defaultdict(list)
        for key, rows in sharers.items():
            length = lens[rows[0]]
            count = -(-length // size)
            for index, block in enumerate(key[-count:]):
                by_count[len(rows)].append((block, index * size, rows))
        runs: list[list[tuple[int, int, list[int]]]] = []
        for parts in by_count.values():
            parts.sort(key=lambda part: part[0])
            for part in parts:
                last = runs[-1][-1] if runs else None
                if last is not None and last[0] + 1 == part[0] and len(last[2]) == len(part[2]):
                    runs[-1].append(part)
                else:
                    runs.append([part])
        self._runs = [self._run(run, lens, bias) for run in runs]
        self._sequences = torch.cat([run.queries for run in self._runs])  # [P]
        self.num_queries = len(lens)  # B
        self._is_whole = len(self._sequences) == len(lens)  # one part each: nothing to merge

    def _run(self, parts: list[tuple[int, int, list[int]]], lens: Sequence[int], bias: Tensor | None) -> _Run:
        queries = torch.tensor([row for _, _, rows in parts for row in rows])
        starts = torch.tensor([start for _, start, _ in parts]).view(-1, 1)
        ends = torch.tensor([lens[rows[0]] for _, _, rows in parts]).view(-1, 1)
        extent = min(self._pages.shape[-2], int((ends - starts).max()))
        seen = starts + torch.arange(extent) < ends  # [blocks, E]
        mask = None
        if bias is not None:
            distance = (ends - 1 - starts - torch.arange(extent)).clamp_(min=0)
            mask = bias[:, distance].transpose(0, 1).unsqueeze(2)  # [blocks, H, 1, E]
        if not seen.all():
            hidden = torch.zeros(seen.shape, dtype=self._pages.dtype).masked_fill_(~seen, -torch.inf)
            mask = hidden[:, None, None] if mask is None else mask + hidden[:, None, None]
        return _Run(parts[0][0], parts[-1][0] + 1, extent, queries, mask)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q [B, H, D] -> [B, H, D]."""
        outs: list[Tensor] = []
        sums: list[Tensor] = []
        for run in self._runs:
            keys, values = self._pages[run.first : run.end, layer, :, :, : run.extent].unbind(1)  # [blocks, H, E, D]
            queries = q[run.queries].unflatten(0, (len(keys), -1)).transpose(1, 2)  # [blocks, H, sharing, D]
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries, keys, values, attn_mask=run.mask, scale=self._scale
            )
            outs.append(out.transpose(1, 2).flatten(0, 1))
            sums.append(lse.transpose(1, 2).flatten(0, 1))
        out = torch.cat(outs)  # [P, H, D]
        if self._is_whole:
            return torch.empty_like(q).index_copy_(0, self._sequences, out)
        lse = torch.cat(sums)  # [P, H] float32
        index = self._sequences
        largest = lse.new_full((self.num_queries, lse.shape[1]), -torch.inf)
        largest.scatter_reduce_(0, index[:, None].expand_as(lse), lse, "amax")
        weights = (lse - largest[index]).exp_()
        total = torch.zeros_like(largest).index_add_(0, index, weights)
        merged = out.new_zeros(q.shape, dtype=lse.dtype).index_add_(0, index, out * weights.unsqueeze(-1))
        return (merged / total.unsqueeze(-1)).to(q.dtype)

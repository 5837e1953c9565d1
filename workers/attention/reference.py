"""Causal attention over K/V pages in plain torch: the oracle of every kernel, and what CPU workers run.

Shapes: T tokens of the step, B sequences, H query heads, K key/value heads, G = H / K, D head size, S block size,
M blocks, C context.

Decodes are sorted by length into a few buckets. Each bucket gathers its pages once, head by head, so that the copy
is already [B, K, C, D], and one call attends all of it, the G query heads of a key as query rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.attention.bucketing import bucket_table, buckets_by_length, chunk_mask, clear_started
from workers.attention.interface import AttentionBatch, AttentionProblem, KvCache
from workers.attention.page_gather import PageGather


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Decodes [start, end) in the order of their lengths, attended by one call."""

    start: int
    end: int
    context: int  # C, of the longest
    rows: Tensor  # [2 * B * K * M] int64: flat page rows of layer 0
    mask: Tensor | None  # [B, 1, 1, C] or, with a bias, [B, K, G, C]: added to the scores; None: all are equally long


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One sequence with several query tokens, rows [start, end) of T."""

    start: int
    end: int
    context: int  # C
    rows: Tensor | None  # [2 * K * M] int64; None when nothing is cached: the step's own k and v are all there is
    mask: Tensor | None  # [end - start, C] or, with a bias, [K, G, end - start, C]: added to the scores


class ReferenceAttention:
    """Stateless but for the problem. See `AttentionBackend`."""

    def __init__(self, problem: AttentionProblem) -> None:
        self.problem = problem

    @property
    def name(self) -> str:
        return "reference"

    def begin(
        self,
        batch: AttentionBatch,
        group: int,
        cache: KvCache,
        region: str,
        bias: Tensor | None = None,
        *,
        with_decodes: bool = True,
    ) -> ReferenceStep:
        """`bias` [H, longest context]: added to the scores of a query and the key that stands so far before it.
        Without decodes, what single queries see is left to the caller: their rows come out as they may."""
        pages = cache.pages(region)
        table = batch.groups[group].block_table.to(torch.int64)
        clear_started(batch, table, pages, self.problem.block_size)
        gather = PageGather(pages)
        runs = buckets_by_length(batch.context_lens, range(batch.num_decodes if with_decodes else 0))
        order = [sequence for members in runs for sequence in members]
        buckets = self._buckets(batch, runs, table, gather, bias)
        chunks = [self._chunk(batch, b, table, gather, bias) for b in range(batch.num_decodes, batch.num_sequences)]
        slots = batch.groups[group].slot_mapping
        return ReferenceStep(self.problem, pages, gather, slots, order, buckets, chunks)

    def _buckets(
        self, batch: AttentionBatch, runs: list[list[int]], table: Tensor, gather: PageGather, bias: Tensor | None
    ) -> list[_Bucket]:
        buckets: list[_Bucket] = []
        start = 0
        for members in runs:
            contexts = [batch.context_lens[sequence] for sequence in members]
            context, blocks, mask = bucket_table(contexts, table[members], self.problem.block_size, self.problem.dtype)
            if bias is not None:
                last = torch.tensor(contexts, device=bias.device).view(-1, 1) - 1
                mask = self._biased(bias, last, context, mask).movedim(2, 0)
            end = start + len(members)
            buckets.append(_Bucket(start, end, context, gather.rows(blocks), mask))
            start = end
        return buckets

    def _chunk(
        self, batch: AttentionBatch, sequence: int, table: Tensor, gather: PageGather, bias: Tensor | None
    ) -> _Chunk:
        start, end = batch.query_starts[sequence : sequence + 2]
        context = batch.context_lens[sequence]
        cached = context - (end - start)
        mask = None
        if cached or bias is not None:
            mask = chunk_mask(cached, context, self.problem.dtype, table.device)
        if bias is not None and mask is not None:
            queries = torch.arange(cached, context, device=bias.device).view(-1, 1)
            mask = mask + self._biased(bias, queries, context, None)
        if cached == 0:
            return _Chunk(start, end, context, None, mask)
        blocks = table[sequence : sequence + 1, : -(-context // self.problem.block_size)]
        return _Chunk(start, end, context, gather.rows(blocks), mask)

    def _biased(self, bias: Tensor, queries: Tensor, context: int, mask: Tensor | None) -> Tensor:
        """The bias [K, G, N, C] of queries at positions [N, 1] and all keys of a context, `mask` [N, 1, 1, C] added.

        Keys behind a query get that of no distance, which the mask hides.
        """
        distance = (queries - torch.arange(context, device=bias.device)).clamp_(min=0)
        chosen = bias[:, distance].unflatten(0, (self.problem.num_kv_heads, -1))
        return chosen if mask is None else chosen + mask.view(len(queries), context)


class ReferenceStep:
    """See `AttentionStep`. Reads and writes the pages it was begun with."""

    def __init__(
        self,
        problem: AttentionProblem,
        pages: Tensor,
        gather: PageGather,
        slots: Tensor,
        order: list[int],
        buckets: list[_Bucket],
        chunks: list[_Chunk],
    ) -> None:
        self._problem = problem
        self._pages = pages  # [blocks, layers, 2, K, S, D]
        self._gather = gather.gather
        self._blocks = slots // problem.block_size
        self._offsets = slots % problem.block_size
        self._order = torch.tensor(order, device=pages.device)
        self._buckets = buckets
        self._chunks = chunks

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._pages[:, layer].unbind(1)  # [blocks, K, S, D]
        keys[self._blocks, :, self._offsets] = k
        values[self._blocks, :, self._offsets] = v
        out = torch.empty_like(q)  # [T, H, D]
        if self._buckets:
            self._decode(layer, q, out)
        for chunk in self._chunks:
            out[chunk.start : chunk.end] = self._prefill(layer, chunk, q, k, v)
        return out.flatten(1)

    def _decode(self, layer: int, q: Tensor, out: Tensor) -> None:
        problem = self._problem
        grouped = q[: len(self._order)].index_select(0, self._order)
        grouped = grouped.view(-1, problem.num_kv_heads, problem.group_size, problem.head_dim)
        for bucket in self._buckets:
            size = bucket.end - bucket.start
            keys, values = self._gather(layer, bucket.rows, size, bucket.context)
            queries = grouped[bucket.start : bucket.end]
            part = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bucket.mask, scale=problem.scale)
            out.index_copy_(0, self._order[bucket.start : bucket.end], part.reshape(size, *out.shape[1:]))

    def _prefill(self, layer: int, chunk: _Chunk, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[end - start, H, D]. The K/V heads are the batch, and their G query heads read them without a copy."""
        problem = self._problem
        queries = q[chunk.start : chunk.end].unflatten(1, (problem.num_kv_heads, -1))
        if chunk.rows is None:
            keys, values = (part[chunk.start : chunk.end].transpose(0, 1) for part in (k, v))
        else:
            keys, values = (part[0] for part in self._gather(layer, chunk.rows, 1, chunk.context))
        keys, values = (
            part.unsqueeze(1).expand(-1, problem.group_size, -1, -1) for part in (keys, values)
        )  # [K, G, C, D]
        part = F.scaled_dot_product_attention(
            queries.permute(1, 2, 0, 3),
            keys,
            values,
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=problem.scale,
        )
        return part.permute(2, 0, 1, 3).flatten(1, 2)

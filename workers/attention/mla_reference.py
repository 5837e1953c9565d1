"""Latent attention over paged rows in plain torch: the oracle of every kernel, and what CPU workers run.

Shapes as in `mla_interface`; B sequences, S block size, M blocks, K = index_topk.

Rows that generate densely are sorted by length into a few buckets; a bucket gathers its blocks once and one call
attends all of it. Sparse rows are scored bucket by bucket, then attend all together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.attention.indexer import index_scores, select
from workers.attention.interface import AttentionBatch, KvCache
from workers.attention.mla_interface import (
    INDEX_KEYS,
    LATENTS,
    ContextKind,
    DenseContext,
    IndexQueries,
    MlaProblem,
)
from workers.attention.sparse import attend_chosen

MAX_BUCKETS = 4
MIN_BUCKET_SEQUENCES = 4


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Rows [start, end) of `generation_rows`: single tokens of several sequences, or several tokens of one."""

    start: int
    end: int
    sequences: int  # B
    context: int  # C, of the longest
    blocks: Tensor  # [B * M] int64: rows of layer 0 in pages seen as [blocks * layers, S * size]
    num_visible: Tensor  # [end - start] int64
    mask: Tensor | None  # [B, 1, 1, C]: 0 or -inf; None when all are equally long


class ReferenceMla:
    """Stateless but for the problem. See `MlaBackend`."""

    def __init__(self, problem: MlaProblem) -> None:
        self.problem = problem

    @property
    def name(self) -> str:
        return "reference"

    def begin(self, batch: AttentionBatch, group: int, cache: KvCache) -> ReferenceMlaStep:
        table = batch.groups[group].block_table.to(torch.int64)
        latents = cache.pages(LATENTS)
        self._clear_started(batch, table, latents)
        dense, sparse = self._split(batch)
        contexts = [self._context(batch, sequence, table.device) for sequence in dense if sequence >= batch.num_decodes]
        single = [sequence for sequence in dense if sequence < batch.num_decodes]
        num_layers = latents.shape[1]
        rows: list[int] = []
        dense_buckets = self._buckets(batch, single, table, num_layers, rows)
        num_dense = len(rows)
        sparse_buckets = self._buckets(
            batch, [sequence for sequence in sparse if sequence < batch.num_decodes], table, num_layers, rows
        )
        for sequence in sparse:
            if sequence >= batch.num_decodes:
                sparse_buckets.append(self._bucket(batch, [sequence], table, num_layers, rows))
        return ReferenceMlaStep(
            self.problem, batch, group, cache, table, contexts, rows, num_dense, dense_buckets, sparse_buckets
        )

    def _split(self, batch: AttentionBatch) -> tuple[list[int], list[int]]:
        """Sequences that see everything, and those that choose: cached and new tokens together decide."""
        topk = self.problem.index_topk
        dense: list[int] = []
        sparse: list[int] = []
        for sequence, context in enumerate(batch.context_lens):
            (dense if topk is None or context <= topk else sparse).append(sequence)
        return dense, sparse

    def _clear_started(self, batch: AttentionBatch, table: Tensor, pages: Tensor) -> None:
        """Zeroes the last block of sequences that start it now and do not fill it.

        What an earlier owner left behind the context is gathered under the mask, and a NaN survives every mask.
        Index keys need no such care: scores are replaced, not multiplied.
        """
        size = self.problem.block_size
        started = [
            (sequence, context // size)
            for sequence, (context, new) in enumerate(zip(batch.context_lens, batch.query_lens, strict=True))
            if context % size and context // size * size >= context - new
        ]
        if started:
            sequences, columns = torch.tensor(started, device=table.device).unbind(1)
            pages.index_fill_(0, table[sequences, columns], 0)

    def _context(self, batch: AttentionBatch, sequence: int, device: torch.device) -> DenseContext:
        start, end = batch.query_starts[sequence : sequence + 2]
        context = batch.context_lens[sequence]
        cached = context - (end - start)
        piece = self.problem.max_piece_tokens
        if cached == 0:
            return DenseContext(ContextKind.FRESH, sequence, start, end, 0, (), None)
        if context > piece:
            pieces = tuple((first, min(first + piece, cached)) for first in range(0, cached, piece))
            return DenseContext(ContextKind.CHUNKED, sequence, start, end, cached, pieces, None)
        last_seen = torch.arange(cached, context, device=device).view(-1, 1)
        mask = self._mask(torch.arange(context, device=device) <= last_seen)
        return DenseContext(ContextKind.CACHED, sequence, start, end, cached, (), mask)

    def _buckets(
        self, batch: AttentionBatch, singles: Sequence[int], table: Tensor, num_layers: int, rows: list[int]
    ) -> list[_Bucket]:
        """Buckets of sequences with one token each; appends their rows of T."""
        if not singles:
            return []
        order = sorted(singles, key=batch.context_lens.__getitem__)
        count = min(MAX_BUCKETS, max(1, len(order) // MIN_BUCKET_SEQUENCES))
        edges = [len(order) * i // count for i in range(count + 1)]
        return [self._bucket(batch, order[edges[i] : edges[i + 1]], table, num_layers, rows) for i in range(count)]

    def _bucket(
        self, batch: AttentionBatch, members: Sequence[int], table: Tensor, num_layers: int, rows: list[int]
    ) -> _Bucket:
        """`members` by length; either one sequence, or each with one token."""
        start = len(rows)
        lengths: list[int] = []
        for sequence in members:
            first, end = batch.query_starts[sequence : sequence + 2]
            context = batch.context_lens[sequence]
            rows.extend(range(first, end))
            lengths.extend(range(context - (end - first) + 1, context + 1))
        num_visible = torch.tensor(lengths, device=table.device)
        longest = lengths[-1]
        blocks = table[list(members), : -(-longest // self.problem.block_size)]
        mask = None
        if len(members) > 1 and lengths[0] < longest:
            # Shorter sequences repeat their own first block: nobody else's bytes are ever multiplied, not even by 0.
            held = torch.arange(blocks.shape[1], device=table.device) * self.problem.block_size
            blocks = torch.where(held < num_visible.view(-1, 1), blocks, blocks[:, :1])
            seen = torch.arange(longest, device=table.device) < num_visible.view(-1, 1)
            mask = self._mask(seen).view(len(members), 1, 1, -1)
        return _Bucket(start, len(rows), len(members), longest, (blocks * num_layers).flatten(), num_visible, mask)

    def _mask(self, seen: Tensor) -> Tensor:
        zeros = torch.zeros(seen.shape, dtype=self.problem.dtype, device=seen.device)
        return zeros.masked_fill_(~seen, float("-inf"))


class ReferenceMlaStep:
    """See `MlaStep`. Reads and writes the pages it was begun with."""

    def __init__(
        self,
        problem: MlaProblem,
        batch: AttentionBatch,
        group: int,
        cache: KvCache,
        table: Tensor,
        contexts: list[DenseContext],
        rows: list[int],
        num_dense: int,
        dense: list[_Bucket],
        sparse: list[_Bucket],
    ) -> None:
        self._problem = problem
        self._latents = cache.pages(LATENTS)  # [blocks, layers, S, L + R]
        self._keys = cache.pages(INDEX_KEYS) if problem.index_topk is not None else None  # [blocks, layers, S, J]
        self._num_layers = self._latents.shape[1]
        slots = batch.groups[group].slot_mapping
        size = problem.block_size
        # Of layer 0, in pages seen as [blocks * layers * S, size].
        self._slots = slots // size * (self._num_layers * size) + slots % size
        self._table = table
        self.contexts = contexts
        self._rows = torch.tensor(rows, device=table.device) if rows else None
        self._num_dense = num_dense
        self._dense = dense
        self._sparse = sparse

    @property
    def generation_rows(self) -> Tensor | None:
        return self._rows

    @property
    def sparse_rows(self) -> Tensor | None:
        return None if self._rows is None or not self._sparse else self._rows[self._num_dense :]

    def write(self, layer: int, latents: Tensor, index_keys: Tensor | None) -> None:
        slots = self._slots + layer * self._problem.block_size
        self._flat(self._latents).index_copy_(0, slots, latents)
        if self._keys is not None:
            assert index_keys is not None, "a model with an indexer caches its keys in every step"
            self._flat(self._keys).index_copy_(0, slots, index_keys)

    def cached_rows(self, layer: int, context: DenseContext, start: int, end: int) -> Tensor:
        size = self._problem.block_size
        first = start // size
        blocks = self._table[context.sequence, first : -(-end // size)]
        pages = self._latents[blocks, layer].flatten(0, 1)
        return pages[start - first * size : end - first * size]

    def generate(self, layer: int, queries: Tensor, index: IndexQueries | None) -> Tensor:
        parts = [self._attend_all(layer, bucket, queries[bucket.start : bucket.end]) for bucket in self._dense]
        if self._sparse:
            assert index is not None, "sparse rows need index queries"
            chosen = self._choose(layer, index)
            parts.append(
                attend_chosen(
                    queries[self._num_dense :],
                    self._flat(self._latents),
                    chosen,
                    latent_size=self._problem.latent_size,
                    scale=self._problem.scale,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _flat(self, pages: Tensor) -> Tensor:
        """[blocks * layers * S, size]."""
        return pages.view(-1, pages.shape[-1])

    def _gather(self, pages: Tensor, layer: int, bucket: _Bucket) -> Tensor:
        """Whole contexts of a bucket, [B, C, size]."""
        flat = pages.view(-1, pages.shape[2] * pages.shape[3])
        copies = flat.index_select(0, bucket.blocks + layer)
        return copies.view(bucket.sequences, -1, pages.shape[3])[:, : bucket.context]

    def _attend_all(self, layer: int, bucket: _Bucket, queries: Tensor) -> Tensor:
        """[B, H, L + R] -> [B, H, L]. The heads are query rows of one head, whole rows are values, cut afterwards."""
        rows = self._gather(self._latents, layer, bucket).unsqueeze(1)
        out = F.scaled_dot_product_attention(
            queries.unsqueeze(1), rows, rows, attn_mask=bucket.mask, scale=self._problem.scale
        )
        return out.squeeze(1)[..., : self._problem.latent_size]

    def _choose(self, layer: int, index: IndexQueries) -> Tensor:
        """[P, K] int64: indices into the flat latents, -1 for none."""
        topk, keys = self._problem.index_topk, self._keys
        assert topk is not None and keys is not None
        size = self._problem.block_size
        parts: list[Tensor] = []
        for bucket in self._sparse:
            start, end = bucket.start - self._num_dense, bucket.end - self._num_dense
            shape = (bucket.sequences, (end - start) // bucket.sequences)
            scores = index_scores(
                index.queries[start:end].unflatten(0, shape),
                index.weights[start:end].unflatten(0, shape),
                self._gather(keys, layer, bucket),
            )
            best = select(scores.flatten(0, 1), bucket.num_visible, topk)  # [B * n, K]: positions
            blocks = (bucket.blocks + layer).view(bucket.sequences, -1).expand(end - start, -1)
            rows = blocks.gather(1, best.clamp(min=0) // size) * size + best % size
            parts.append(torch.where(best < 0, best, rows))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

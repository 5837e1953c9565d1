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

from workers.attention.bucketing import bucket_table, buckets_by_length, chunk_mask, clear_started
from workers.attention.index_keys import gather_pages, write_pages
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
        # Index keys need no such care: scores are replaced, not multiplied.
        clear_started(batch, table, latents, self.problem.block_size)
        dense, sparse = self._split(batch)
        contexts = [self._context(batch, sequence, table.device) for sequence in dense if sequence >= batch.num_decodes]
        num_layers = latents.shape[1]
        rows: list[int] = []
        dense_runs = buckets_by_length(
            batch.context_lens, [sequence for sequence in dense if sequence < batch.num_decodes]
        )
        dense_buckets = [self._bucket(batch, members, table, num_layers, rows) for members in dense_runs]
        num_dense = len(rows)
        sparse_runs = buckets_by_length(
            batch.context_lens, [sequence for sequence in sparse if sequence < batch.num_decodes]
        )
        sparse_runs += [[sequence] for sequence in sparse if sequence >= batch.num_decodes]
        sparse_buckets = [self._bucket(batch, members, table, num_layers, rows) for members in sparse_runs]
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
        mask = chunk_mask(cached, context, self.problem.dtype, device)
        return DenseContext(ContextKind.CACHED, sequence, start, end, cached, (), mask)

    def _bucket(
        self, batch: AttentionBatch, members: Sequence[int], table: Tensor, num_layers: int, rows: list[int]
    ) -> _Bucket:
        """`members` by length; either one sequence, or each with one token. Appends their rows of T."""
        start = len(rows)
        num_visible: list[int] = []
        for sequence in members:
            first, end = batch.query_starts[sequence : sequence + 2]
            context = batch.context_lens[sequence]
            rows.extend(range(first, end))
            num_visible.extend(range(context - (end - first) + 1, context + 1))
        contexts = [batch.context_lens[sequence] for sequence in members]
        longest, blocks, mask = bucket_table(contexts, table[members], self.problem.block_size, self.problem.dtype)
        return _Bucket(
            start,
            len(rows),
            len(members),
            longest,
            (blocks * num_layers).flatten(),
            torch.tensor(num_visible, device=table.device),
            mask,
        )


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
        # [blocks, layers, S, J], or uint8 [blocks, layers, S * (J + 4)]: fp8 and scales.
        self._keys = cache.pages(INDEX_KEYS) if problem.index_topk is not None else None
        self._num_layers = self._latents.shape[1]
        slots = self._given_slots = batch.groups[group].slot_mapping
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
            if self._keys.dtype == torch.uint8:
                write_pages(self._keys, layer, self._given_slots, index_keys)
            else:
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

    def _index_keys(self, pages: Tensor, layer: int, bucket: _Bucket, size: int) -> Tensor:
        """[B, C, J]."""
        if pages.dtype != torch.uint8:
            return self._gather(pages, layer, bucket)
        values, scales = gather_pages(pages, bucket.blocks + layer, size)
        keys = values.float() * scales.unsqueeze(1)
        return keys.view(bucket.sequences, -1, size)[:, : bucket.context]

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
                self._index_keys(keys, layer, bucket, index.queries.shape[-1]),
            )
            best = select(scores.flatten(0, 1), bucket.num_visible, topk)  # [B * n, K]: positions
            blocks = (bucket.blocks + layer).view(bucket.sequences, -1).expand(end - start, -1)
            rows = blocks.gather(1, best.clamp(min=0) // size) * size + best % size
            parts.append(torch.where(best < 0, best, rows))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

"""Attention of encoder–decoder models in plain torch: within an encoder's input, from a decoder to it, and of single
queries without a copy of what they read, on a CPU.

Neither is causal, and neither takes a length from the decoder's own context: what an encoder read has lengths of its
own, which must be given.

Shapes: T packed tokens, B sequences, H heads (each with its own key and value), D head size, S block size, C tokens
of the longest encoder input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.attention.block_parts import BlockParts
from workers.attention.bucketing import bucket_table, buckets_by_length
from workers.attention.interface import (
    AttentionBatch,
    AttentionProblem,
    AttentionStep,
    EncoderBatch,
    FixedGroupMetadata,
    KvCache,
)
from workers.attention.page_gather import PageGather
from workers.attention.reference import ReferenceAttention, ReferenceStep
from workers.attention.relative_bias import windows


class EncoderStep:
    """One packed batch of encoder inputs, all layers. Raises ValueError for a bias that is not the longest's."""

    def __init__(self, batch: EncoderBatch, scale: float, bias: Tensor | None = None) -> None:
        """`bias` [H, 2 C - 1]: see `EncoderDecoderBackend`."""
        check_bias(batch, bias)
        self._scale = scale
        self._batch = batch
        self._bias = None if bias is None else windows(bias, batch.longest)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [T, H, D] -> [T, H * D]: every token sees all of its own input and nothing else."""
        batch, bias = self._batch, self._bias
        if len(q) != batch.num_tokens:
            raise ValueError(f"{len(q)} packed tokens for encoder inputs of {batch.lens}")
        out = torch.empty_like(q)
        for start, length in zip(batch.starts, batch.lens, strict=True):
            own = slice(start, start + length)
            # A batch of one: without that dim a CPU takes the slow way, which writes all scores to memory.
            queries, keys, values = (part[own].transpose(0, 1).unsqueeze(0) for part in (q, k, v))
            seen = None if bias is None else bias[:, :length, :length].unsqueeze(0)
            part = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=self._scale)
            out[own] = part[0].transpose(0, 1)
        return out.flatten(1)


def check_bias(batch: EncoderBatch, bias: Tensor | None) -> None:
    """Raises ValueError for a bias that is not the longest's."""
    if bias is not None and bias.shape[1] != 2 * batch.longest - 1:
        raise ValueError(f"a bias of {tuple(bias.shape)} for inputs of up to {batch.longest} tokens")


def clear_ends(batch: EncoderBatch, pages: Tensor) -> None:
    """Zeroes the last blocks of inputs that do not fill them. What an earlier owner left behind an input's end is
    gathered under the mask, and a NaN survives every mask."""
    size = pages.shape[-2]
    ends = torch.tensor([start + n - 1 for start, n in zip(batch.starts, batch.lens, strict=True) if n % size])
    if len(ends):
        pages.index_fill_(0, batch.slot_mapping[ends.to(pages.device, non_blocking=True)] // size, 0)


class CrossWriter:
    """Keeps the keys and values that decoder layers make of encoder states, in the blocks of a fixed group."""

    def __init__(self, batch: EncoderBatch, cache: KvCache, region: str) -> None:
        self._pages = cache.pages(region)  # [blocks, layers, 2, H, S, D]
        size = self._pages.shape[-2]
        self._blocks, self._offsets = batch.slot_mapping // size, batch.slot_mapping % size
        clear_ends(batch, self._pages)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v [T, H, D] of one decoder layer."""
        keys, values = self._pages[:, layer].unbind(1)
        keys[self._blocks, :, self._offsets] = k
        values[self._blocks, :, self._offsets] = v


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Sequences with one query each, attended by one call; a longer chunk of one sequence is a bucket of its own."""

    rows: Tensor  # of T, one per query
    num_sequences: int
    context: int
    gathered: Tensor  # see PageGather.rows
    mask: Tensor | None


class CrossStep:
    """One step of decoder queries over a fixed group, all layers. Nothing is written.

    Raises ValueError where the lengths of the encoder inputs are not given: they cannot be guessed.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        batch: AttentionBatch,
        fixed: FixedGroupMetadata,
        cache: KvCache,
        region: str,
        *,
        in_place: bool,
    ) -> None:
        """`in_place`: single queries read the blocks where they lie."""
        if len(fixed.lens) != batch.num_sequences or min(fixed.lens, default=1) < 1:
            raise ValueError(
                f"encoder lengths {fixed.lens} for {batch.num_sequences} sequences; give one of each, >= 1"
            )
        self._scale = problem.scale
        pages = cache.pages(region)
        self._pages = PageGather(pages)
        table = fixed.block_table.to(torch.int64)
        num_in_place = batch.num_decodes if in_place else 0
        self._in_place = None
        if num_in_place:
            tables, lens = table[:num_in_place].tolist(), fixed.lens[:num_in_place]
            self._in_place = BlockParts(pages, tables, lens, scale=problem.scale)
        runs = buckets_by_length(fixed.lens, range(num_in_place, batch.num_decodes))
        runs += [[sequence] for sequence in range(batch.num_decodes, batch.num_sequences)]
        self._buckets = [self._bucket(problem, batch, fixed, table, members) for members in runs]

    def _bucket(
        self,
        problem: AttentionProblem,
        batch: AttentionBatch,
        fixed: FixedGroupMetadata,
        table: Tensor,
        members: list[int],
    ) -> _Bucket:
        lens = [fixed.lens[sequence] for sequence in members]
        context, blocks, mask = bucket_table(lens, table[members], problem.block_size, problem.dtype)
        rows = [row for sequence in members for row in range(*batch.query_starts[sequence : sequence + 2])]
        gathered = self._pages.rows(blocks)
        return _Bucket(torch.tensor(rows, device=table.device), len(members), context, gathered, mask)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q [T, H, D] -> [T, H * D]: every query sees the whole encoder input of its sequence."""
        out = torch.empty_like(q)
        if self._in_place is not None:
            num_in_place = self._in_place.num_queries
            out[:num_in_place] = self._in_place.attend(layer, q[:num_in_place])
        for bucket in self._buckets:
            keys, values = self._pages.gather(layer, bucket.gathered, bucket.num_sequences, bucket.context)
            queries = q[bucket.rows].unflatten(0, (bucket.num_sequences, -1)).transpose(1, 2)  # [B, H, n, D]
            part = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bucket.mask, scale=self._scale)
            out[bucket.rows] = part.transpose(1, 2).flatten(0, 1)
        return out.flatten(1)


class InPlaceStep:
    """See `AttentionStep`: what writes and attends chunks, and the single queries."""

    def __init__(self, rest: ReferenceStep, decodes: BlockParts) -> None:
        self._rest = rest
        self._decodes = decodes

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self._rest.attend(layer, q, k, v)
        singles = self._decodes.num_queries
        out[:singles] = self._decodes.attend(layer, q[:singles]).flatten(1)
        return out


class SelfAttention:
    """Of the decoder: causal, with a head of keys and values for each head of queries. See `AttentionBackend`."""

    def __init__(self, problem: AttentionProblem, *, in_place: bool) -> None:
        """`in_place`: single queries read the blocks where they lie."""
        assert problem.group_size == 1, f"{problem}: heads share keys"
        self._problem = problem
        self._reference = ReferenceAttention(problem)
        self._in_place = in_place

    @property
    def name(self) -> str:
        return self._reference.name

    def begin(
        self, batch: AttentionBatch, group: int, cache: KvCache, region: str, bias: Tensor | None = None
    ) -> AttentionStep:
        in_place = self._in_place and batch.num_decodes > 0
        step = self._reference.begin(batch, group, cache, region, bias, with_decodes=not in_place)
        if not in_place:
            return step
        tables = batch.groups[group].block_table[: batch.num_decodes].tolist()
        lens = batch.context_lens[: batch.num_decodes]
        return InPlaceStep(step, BlockParts(cache.pages(region), tables, lens, scale=self._problem.scale, bias=bias))


class ReferenceBackend:
    """See `EncoderDecoderBackend`."""

    reads_device_lens = False

    def __init__(self, problem: AttentionProblem, *, in_place: bool) -> None:
        """`in_place`: single queries read the blocks where they lie."""
        self._problem, self._in_place = problem, in_place
        self._self_attention = SelfAttention(problem, in_place=in_place)

    def encoder(self, batch: EncoderBatch, scale: float, bias: Tensor | None) -> EncoderStep:
        return EncoderStep(batch, scale, bias)

    def own(self, batch: AttentionBatch, group: int, cache: KvCache, region: str, bias: Tensor | None) -> AttentionStep:
        return self._self_attention.begin(batch, group, cache, region, bias)

    def cross(self, batch: AttentionBatch, fixed: FixedGroupMetadata, cache: KvCache, region: str) -> CrossStep:
        return CrossStep(self._problem, batch, fixed, cache, region, in_place=self._in_place)

    def writer(self, batch: EncoderBatch, cache: KvCache, region: str) -> CrossWriter:
        return CrossWriter(batch, cache, region)

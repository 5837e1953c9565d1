"""Attention of encoder–decoder models in few launches, in plain torch: sequences of about one length are padded to the
longest of them and attended by one call. What a GPU reads prompts and encoder inputs with; of single queries, the
reference of the kernel that replaces it there.

Single queries take lengths from the device alone. Nothing here waits for it, and nothing relies on what stands in a
block behind the tokens of its sequence, NaN included.

Shapes: T packed tokens, B sequences of a bucket, L tokens of the longest of them, H heads (each with its own key and
value), D head size, S block size, M blocks, C keys of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.attention.bucketing import additive_mask
from workers.attention.interface import (
    AttentionBatch,
    AttentionProblem,
    EncoderBatch,
    FixedGroupMetadata,
    GroupMetadata,
    KvCache,
)
from workers.attention.page_gather import PageGather

_ALIGNED = 16  # tokens: attention with a mask is fast where its rows are multiples of so many
_MOST_SCORES = 1 << 23  # of one head, of a bucket of several sequences: what its mask may hold


class SingleQueries(Protocol):
    """One query for each of the first sequences of a batch, all layers."""

    @property
    def num_queries(self) -> int: ...

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q [B, H, D] -> [B, H, D]."""
        ...


class SingleQueriesMaker(Protocol):
    def __call__(self, pages: Tensor, table: Tensor, last: Tensor, scale: float, bias: Tensor | None) -> SingleQueries:
        """pages [blocks, layers, 2, H, S, D], table [B, M], padded with any blocks, last [B]: index of the last key
        that a query sees. `bias` [H, most keys]: added to the score of the key that stands so far before the last."""
        ...


class PaddedQueries:
    """See `SingleQueriesMaker`: every table is gathered to its end, and what is not seen is hidden."""

    def __init__(self, pages: Tensor, table: Tensor, last: Tensor, scale: float, bias: Tensor | None) -> None:
        self._scale = scale
        self._pages = PageGather(pages)
        self._rows = self._pages.rows(table.to(torch.int64))
        self._count, self._context = len(table), table.shape[1] * pages.shape[-2]
        distance = last.view(-1, 1) - torch.arange(self._context, device=table.device)  # [B, C]
        self._hidden = (distance < 0).view(self._count, 1, -1, 1)
        self._mask = additive_mask(distance >= 0, pages.dtype)[:, None, None]
        if bias is not None:
            self._mask = self._mask + bias[:, distance.clamp_(0, bias.shape[1] - 1)].transpose(0, 1).unsqueeze(2)

    @property
    def num_queries(self) -> int:
        return self._count

    def attend(self, layer: int, q: Tensor) -> Tensor:
        keys, values = (
            part.masked_fill(self._hidden, 0)
            for part in self._pages.gather(layer, self._rows, self._count, self._context)
        )
        out = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=self._mask, scale=self._scale)
        return out.squeeze(2)


class _Padding:
    """Some sequences of packed rows [T, …] as [B, …, L, …], and back. Shorter ones repeat their last row."""

    def __init__(self, starts: Sequence[int], lens: Sequence[int], device: torch.device) -> None:
        self.longest = -(-max(lens) // _ALIGNED) * _ALIGNED
        self.is_whole = min(lens) == self.longest
        at, lengths = torch.arange(self.longest), torch.tensor(lens).view(-1, 1)
        rows = torch.tensor(starts).view(-1, 1) + at.minimum(lengths - 1)
        own = at < lengths
        self._count = len(lens)
        self._rows = rows.flatten().to(device, non_blocking=True)
        self._packed = rows[own].to(device, non_blocking=True)
        self._places = own.flatten().nonzero().squeeze(1).to(device, non_blocking=True)

    def pad(self, x: Tensor) -> Tensor:
        """[T, H, D] -> [B, H, L, D]."""
        return x.index_select(0, self._rows).unflatten(0, (self._count, -1)).transpose(1, 2)

    def put(self, out: Tensor, into: Tensor) -> None:
        """[B, H, L, D] into the rows of [T, H, D] that are theirs."""
        rows = out.transpose(1, 2).flatten(0, 1)
        into.index_copy_(0, self._packed, rows if self.is_whole else rows.index_select(0, self._places))


def _buckets(lens: Sequence[int], sequences: Sequence[int], widths: Sequence[int]) -> list[list[int]]:
    """Runs of sequences of which each is attended by one call, as few as the masks allow: padding costs less than
    launches. `widths`: keys of each."""
    buckets: list[list[int]] = []
    queries = keys = 0
    for sequence in sorted(sequences, key=widths.__getitem__):
        queries, keys = max(queries, lens[sequence]), max(keys, widths[sequence])
        if not buckets or (len(buckets[-1]) + 1) * queries * keys > _MOST_SCORES:
            buckets.append([])
            queries, keys = lens[sequence], widths[sequence]
        buckets[-1].append(sequence)
    return buckets


class PaddedEncoderStep:
    """See `EncoderAttention`. Raises ValueError for a bias that is not the longest's."""

    def __init__(self, batch: EncoderBatch, scale: float, bias: Tensor | None, dtype: torch.dtype) -> None:
        if bias is not None and bias.shape[1:] != (batch.longest, batch.longest):
            raise ValueError(f"a bias of {tuple(bias.shape)} for inputs of up to {batch.longest} tokens")
        self._batch, self._scale = batch, scale
        device = batch.slot_mapping.device
        starts = batch.starts
        self._parts: list[tuple[_Padding, Tensor | None]] = []
        for members in _buckets(batch.lens, range(len(batch.lens)), batch.lens):
            lens = [batch.lens[i] for i in members]
            padding = _Padding([starts[i] for i in members], lens, device)
            self._parts.append((padding, self._mask(padding, lens, bias, dtype, device)))

    def _mask(
        self, padding: _Padding, lens: list[int], bias: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        longest = padding.longest
        mask = None
        if not padding.is_whole:
            seen = torch.arange(longest) < torch.tensor(lens).view(-1, 1)
            mask = additive_mask(seen, dtype).to(device, non_blocking=True)[:, None, None]  # [B, 1, 1, L]
        if bias is None:
            return mask
        lacking = max(0, longest - bias.shape[1])
        own = F.pad(bias[:, :longest, :longest], (0, lacking, 0, lacking)).contiguous().unsqueeze(0)
        return own if mask is None else mask + own

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(q) != self._batch.num_tokens:
            raise ValueError(f"{len(q)} packed tokens for encoder inputs of {self._batch.lens}")
        out = q.new_empty(q.shape)
        for padding, mask in self._parts:
            queries, keys, values = (padding.pad(part) for part in (q, k, v))
            part = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self._scale)
            padding.put(part, out)
        return out.flatten(1)


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Keys and values of whole contexts, from their blocks."""

    rows: Tensor  # see PageGather.rows
    hidden: Tensor  # [B, 1, C, 1]: what stands behind a context
    context: int  # C


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Several queries of each of some sequences."""

    padding: _Padding
    gathered: _Gathered | None  # None: the keys are the step's own
    mask: Tensor | None  # [B, 1 or H, 1 or L, C]


class _Reader:
    """What chunks of a step see of a group, made from host values once."""

    def __init__(self, problem: AttentionProblem, table: Tensor, pages: Tensor) -> None:
        self._problem, self._table, self._pages = problem, table.to(torch.int64), PageGather(pages)
        self._device = table.device

    def gathered(self, members: list[int], lens: list[int]) -> _Gathered:
        count = -(-max(lens) // self._problem.block_size)
        context = count * self._problem.block_size
        rows = torch.tensor(members).to(self._device, non_blocking=True)
        hidden = torch.arange(context) >= torch.tensor(lens).view(-1, 1)
        blocks = self._table.index_select(0, rows)[:, :count]
        hidden = hidden.to(self._device, non_blocking=True).view(len(members), 1, context, 1)
        return _Gathered(self._pages.rows(blocks), hidden, context)

    def mask(self, seen: Tensor) -> Tensor:
        """From the host."""
        return additive_mask(seen.to(self._device, non_blocking=True), self._problem.dtype)

    def read(self, layer: int, chunks: _Chunks, q: Tensor, own: tuple[Tensor, Tensor] | None, out: Tensor) -> None:
        padding, gathered = chunks.padding, chunks.gathered
        queries = padding.pad(q)
        if gathered is None:
            assert own is not None
            keys, values = (padding.pad(part) for part in own)
        else:
            both = self._pages.gather(layer, gathered.rows, len(queries), gathered.context)
            keys, values = (part.masked_fill_(gathered.hidden, 0) for part in both)  # copies already
        part = F.scaled_dot_product_attention(queries, keys, values, attn_mask=chunks.mask, scale=self._problem.scale)
        padding.put(part, out)


class PaddedSelfStep:
    """See `AttentionStep`."""

    def __init__(
        self,
        problem: AttentionProblem,
        batch: AttentionBatch,
        metadata: GroupMetadata,
        pages: Tensor,
        bias: Tensor | None,
        maker: SingleQueriesMaker,
    ) -> None:
        self._problem, self._pages = problem, pages
        size = problem.block_size
        self._blocks, self._offsets = metadata.slot_mapping // size, metadata.slot_mapping % size
        self._num_singles = singles = batch.num_decodes
        self._is_single = singles == batch.num_sequences
        self._singles = None
        if singles:
            table, last = metadata.block_table[:singles], batch.positions[:singles]
            self._singles = maker(pages, table, last, problem.scale, bias)
        self._chunks: list[_Chunks] = []
        if self._is_single:
            return
        self._reader = _Reader(problem, metadata.block_table, pages)
        chunked = range(singles, batch.num_sequences)
        for is_fresh in (True, False):
            members = [i for i in chunked if (batch.query_lens[i] == batch.context_lens[i]) == is_fresh]
            for bucket in _buckets(batch.query_lens, members, batch.context_lens):
                self._chunks.append(self._bucket(batch, bucket, bias, is_fresh=is_fresh))

    def _bucket(self, batch: AttentionBatch, members: list[int], bias: Tensor | None, *, is_fresh: bool) -> _Chunks:
        queries, contexts = ([lens[i] for i in members] for lens in (batch.query_lens, batch.context_lens))
        padding = _Padding([batch.query_starts[i] for i in members], queries, batch.positions.device)
        gathered = None if is_fresh else self._reader.gathered(members, contexts)
        num_keys = padding.longest if gathered is None else gathered.context
        device = batch.positions.device
        ends, counts = (torch.tensor(lens).to(device, non_blocking=True).view(-1, 1, 1) for lens in (contexts, queries))
        at = ends - counts + torch.arange(padding.longest, device=device).view(-1, 1)  # of each query [B, L, 1]
        keys = torch.arange(num_keys, device=device)
        distance = at - keys  # [B, L, C]
        mask = additive_mask((distance >= 0) & (keys < ends), self._problem.dtype).unsqueeze(1)
        if bias is not None:
            mask = mask + bias[:, distance.clamp_(0, bias.shape[1] - 1)].transpose(0, 1)
        return _Chunks(padding, gathered, mask)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._pages[:, layer].unbind(1)  # [blocks, H, S, D]
        keys[self._blocks, :, self._offsets] = k
        values[self._blocks, :, self._offsets] = v
        if self._singles is not None and self._is_single:
            return self._singles.attend(layer, q).flatten(1)
        out = q.new_empty(q.shape)
        if self._singles is not None:
            out[: self._num_singles] = self._singles.attend(layer, q[: self._num_singles])
        for chunks in self._chunks:
            self._reader.read(layer, chunks, q, (k, v), out)
        return out.flatten(1)


class PaddedCrossStep:
    """See `CrossAttention`. Raises ValueError where the lengths of the encoder inputs are not given."""

    def __init__(
        self,
        problem: AttentionProblem,
        batch: AttentionBatch,
        fixed: FixedGroupMetadata,
        pages: Tensor,
        maker: SingleQueriesMaker,
    ) -> None:
        if len(fixed.lens) != batch.num_sequences or min(fixed.lens, default=1) < 1:
            raise ValueError(
                f"encoder lengths {fixed.lens} for {batch.num_sequences} sequences; give one of each, >= 1"
            )
        self._num_singles = singles = batch.num_decodes
        self._is_single = singles == batch.num_sequences
        self._singles = None
        if singles:
            last = fixed.lens_on_device()[:singles] - 1
            self._singles = maker(pages, fixed.block_table[:singles], last, problem.scale, None)
        self._chunks: list[_Chunks] = []
        if self._is_single:
            return
        self._reader = _Reader(problem, fixed.block_table, pages)
        for bucket in _buckets(batch.query_lens, range(singles, batch.num_sequences), fixed.lens):
            queries, lens = ([each[i] for i in bucket] for each in (batch.query_lens, fixed.lens))
            padding = _Padding([batch.query_starts[i] for i in bucket], queries, fixed.block_table.device)
            gathered = self._reader.gathered(bucket, lens)
            mask = None
            if min(lens) < gathered.context:
                seen = torch.arange(gathered.context) < torch.tensor(lens).view(-1, 1)
                mask = self._reader.mask(seen)[:, None, None]  # [B, 1, 1, C]
            self._chunks.append(_Chunks(padding, gathered, mask))

    def attend(self, layer: int, q: Tensor) -> Tensor:
        if self._singles is not None and self._is_single:
            return self._singles.attend(layer, q).flatten(1)
        out = q.new_empty(q.shape)
        if self._singles is not None:
            out[: self._num_singles] = self._singles.attend(layer, q[: self._num_singles])
        for chunks in self._chunks:
            self._reader.read(layer, chunks, q, None, out)
        return out.flatten(1)


class PaddedBackend:
    """See `EncoderDecoderBackend`."""

    reads_device_lens = True

    def __init__(self, problem: AttentionProblem, maker: SingleQueriesMaker = PaddedQueries) -> None:
        assert problem.group_size == 1, f"{problem}: heads share keys"
        self._problem, self._maker = problem, maker

    def encoder(self, batch: EncoderBatch, scale: float, bias: Tensor | None) -> PaddedEncoderStep:
        return PaddedEncoderStep(batch, scale, bias, self._problem.dtype)

    def own(
        self, batch: AttentionBatch, group: int, cache: KvCache, region: str, bias: Tensor | None
    ) -> PaddedSelfStep:
        return PaddedSelfStep(self._problem, batch, batch.groups[group], cache.pages(region), bias, self._maker)

    def cross(self, batch: AttentionBatch, fixed: FixedGroupMetadata, cache: KvCache, region: str) -> PaddedCrossStep:
        return PaddedCrossStep(self._problem, batch, fixed, cache.pages(region), self._maker)

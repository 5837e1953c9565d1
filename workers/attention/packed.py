"""Attention of encoder–decoder models over packed tokens, and over blocks where they lie: what a step asks of kernels.

`TorchKernels` computes the same in plain torch: the reference of those that a GPU has (`hopper_encoder_decoder.py`),
and what a CPU tries the inputs of a graph out with.

Single queries take lengths from the device alone. Nothing here waits for it, and nothing relies on what stands in a
block behind the tokens of its sequence, NaN included.

Shapes: T packed tokens, B sequences, H heads (each with its own key and value), D head size, S block size, M blocks and
C keys of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.attention.bucketing import additive_mask
from workers.attention.encoder_decoder import check_bias, clear_ends
from workers.attention.interface import (
    AttentionBatch,
    AttentionProblem,
    EncoderBatch,
    FixedGroupMetadata,
    KvCache,
)
from workers.attention.page_gather import PageGather
from workers.attention.relative_bias import windows

_TILE, _LONG_TILE = 64, 128
_LONG = 256  # queries from which long tiles pay


class Spans(NamedTuple):
    """Sequences with queries side by side, and the tiles of their queries, each of which a kernel takes at once."""

    table: Tensor  # int32 [B, 3] on the device: first row, queries, keys; packed keys begin where the queries do
    tiles: Tensor  # int32 [N, 2] there: sequence, and which of its queries is the first; behind its last: an empty tile
    tile: int  # queries

    @classmethod
    def of(cls, starts: Sequence[int], queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Spans:
        tile = _LONG_TILE if max(queries) >= _LONG else _TILE
        counts = -(-np.array(queries) // tile)
        sequences = np.repeat(np.arange(len(counts)), counts)
        firsts = tile * (np.arange(len(sequences)) - np.repeat(counts.cumsum() - counts, counts))
        both = np.concatenate([np.stack([starts, queries, keys], 1).ravel(), np.stack([sequences, firsts], 1).ravel()])
        on_device = torch.from_numpy(both.astype(np.int32)).to(device, non_blocking=True)
        table, tiles = on_device.split([3 * len(counts), 2 * len(sequences)])
        return cls(table.view(-1, 3), tiles.view(-1, 2), tile)

    @classmethod
    def on_device(cls, spans: Tensor, keys: Tensor, num_tokens: int) -> Spans:
        """spans [B, 2] and keys [B]: those of no sequence have no queries; `num_tokens` of all, or more. Waits for
        nothing, and launches the same whatever the lengths are."""
        starts, queries = spans.unbind(1)
        counts = (queries + _TILE - 1) // _TILE
        ends = counts.cumsum(0)
        most = min(num_tokens, num_tokens // _TILE + len(spans))
        at = torch.arange(most, device=spans.device)
        sequences = torch.searchsorted(ends, at, right=True).clamp_(max=len(spans) - 1)
        tiles = torch.stack([sequences, _TILE * (at - (ends - counts)[sequences])], 1)
        return cls(torch.stack([starts, queries, keys], 1).int(), tiles.int(), _TILE)


class Blocks(NamedTuple):
    """Where sequences have their keys and values."""

    pages: Tensor  # [blocks, layers, 2, H, S, D]
    table: Tensor  # [B, M], padded with any blocks


class Kernels(Protocol):
    def write(self, k: Tensor, v: Tensor, pages: Tensor, slots: Tensor, layer: int) -> None:
        """k, v [T, H, D], rows of any stride, into the slots [T] of `layer`."""
        ...

    def attend_singles(
        self, q: Tensor, blocks: Blocks, last: Tensor, layer: int, scale: float, bias: Tensor | None
    ) -> Tensor:
        """q [B, H, D] -> [B, H * D]. last [B]: index of the last key that a query sees. `bias` [H, most keys]: added to
        the scaled score of the key that stands so far before the last."""
        ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, bias: Tensor | None, out: Tensor
    ) -> None:
        """q, k, v [T, H, D], rows of any stride -> out [T, H, D]: each token sees all of its sequence. `bias`
        [H, 2 C - 1]: by how far a key stands behind its query, C - 1 being the query's own."""
        ...

    def attend_blocks(
        self,
        q: Tensor,
        blocks: Blocks,
        layer: int,
        spans: Spans,
        scale: float,
        bias: Tensor | None,
        out: Tensor,
        *,
        causal: bool,
    ) -> None:
        """q [T, H, D] -> the rows of `spans` in out [T, H, D]. Causal: the last query of a sequence sees all its keys,
        the one before it one less; else each sees all. `bias` as of single queries, of causal attention alone."""
        ...


class TorchKernels:
    """See `Kernels`. Copies what it reads."""

    def write(self, k: Tensor, v: Tensor, pages: Tensor, slots: Tensor, layer: int) -> None:
        keys, values = pages[:, layer].unbind(1)  # [blocks, H, S, D]
        blocks, offsets = slots // pages.shape[-2], slots % pages.shape[-2]
        keys[blocks, :, offsets] = k
        values[blocks, :, offsets] = v

    def attend_singles(
        self, q: Tensor, blocks: Blocks, last: Tensor, layer: int, scale: float, bias: Tensor | None
    ) -> Tensor:
        keys, values = _gathered(blocks, layer)
        distance = last.view(-1, 1) - torch.arange(keys.shape[2], device=last.device)  # [B, C]
        hidden = (distance < 0)[:, None, :, None]
        mask = additive_mask(distance >= 0, q.dtype)[:, None, None]
        if bias is not None:
            mask = mask + bias[:, distance.clamp_(0, bias.shape[1] - 1)].transpose(0, 1).unsqueeze(2)
        keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
        return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=mask, scale=scale).flatten(1)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, bias: Tensor | None, out: Tensor
    ) -> None:
        for start, count, _ in spans.table.tolist():
            if not count:
                continue
            own = slice(start, start + count)
            mask = None if bias is None else windows(bias, count)
            out[own] = _attended(q[own], k[own].transpose(0, 1), v[own].transpose(0, 1), mask, scale)

    def attend_blocks(
        self,
        q: Tensor,
        blocks: Blocks,
        layer: int,
        spans: Spans,
        scale: float,
        bias: Tensor | None,
        out: Tensor,
        *,
        causal: bool,
    ) -> None:
        keys, values = _gathered(blocks, layer)
        for sequence, (start, count, num_keys) in enumerate(spans.table.tolist()):
            if not count:
                continue
            own = slice(start, start + count)
            mask = None
            if causal:
                at = torch.arange(num_keys - count, num_keys, device=q.device).view(-1, 1)
                distance = at - torch.arange(num_keys, device=q.device)
                mask = additive_mask(distance >= 0, q.dtype)
                if bias is not None:
                    mask = mask + bias[:, distance.clamp_(min=0)]
            out[own] = _attended(q[own], keys[sequence, :, :num_keys], values[sequence, :, :num_keys], mask, scale)


def _gathered(blocks: Blocks, layer: int) -> tuple[Tensor, Tensor]:
    """K and V of whole tables, each [B, H, C, D]."""
    gather = PageGather(blocks.pages)
    rows = gather.rows(blocks.table.to(torch.int64))
    return gather.gather(layer, rows, len(blocks.table), blocks.table.shape[1] * blocks.pages.shape[-2])


def _attended(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q [n, H, D], keys and values [H, C, D] -> [n, H, D]."""
    seen = None if mask is None else mask.unsqueeze(0)
    queries = q.transpose(0, 1).unsqueeze(0)
    return F.scaled_dot_product_attention(queries, keys.unsqueeze(0), values.unsqueeze(0), attn_mask=seen, scale=scale)[
        0
    ].transpose(0, 1)


class PackedEncoderStep:
    """See `EncoderAttention`. Raises ValueError for a bias that is not the longest's."""

    def __init__(self, kernels: Kernels, batch: EncoderBatch, scale: float, bias: Tensor | None) -> None:
        check_bias(batch, bias)
        self._kernels, self._batch, self._scale, self._bias = kernels, batch, scale, bias
        self._spans = Spans.of(batch.starts, batch.lens, batch.lens, batch.slot_mapping.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(q) != self._batch.num_tokens:
            raise ValueError(f"{len(q)} packed tokens for encoder inputs of {self._batch.lens}")
        out = q.new_empty(q.shape)
        self._kernels.attend(q, k, v, self._spans, self._scale, self._bias, out)
        return out.flatten(1)


class _Queries:
    """Of one step over one group: single ones first, then chunks."""

    def __init__(
        self,
        kernels: Kernels,
        problem: AttentionProblem,
        batch: AttentionBatch,
        blocks: Blocks,
        last: Tensor,
        num_keys: Sequence[int],
        bias: Tensor | None,
        *,
        causal: bool,
    ) -> None:
        """last [B] on the device: index of the last key that the last query of each sees, and `num_keys` [B] the same
        on the host, plus one."""
        self._kernels, self._scale, self._bias, self._causal = kernels, problem.scale, bias, causal
        self._num_singles = singles = batch.num_decodes
        self._singles, self._last = Blocks(blocks.pages, blocks.table[:singles]), last[:singles]
        self._chunks, self._spans = Blocks(blocks.pages, blocks.table[singles:]), None
        if batch.spans is not None:
            self._spans = Spans.on_device(batch.spans, last + 1, batch.num_tokens)
        elif singles < batch.num_sequences:
            starts, lens = batch.query_starts[singles:-1], batch.query_lens[singles:]
            self._spans = Spans.of(starts, lens, num_keys[singles:], last.device)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """[T, H, D] -> [T, H * D]."""
        singles = self._num_singles
        if self._spans is None:
            return self._attend_singles(layer, q)
        out = q.new_empty(q.shape)
        if singles:
            out[:singles] = self._attend_singles(layer, q[:singles]).view_as(out[:singles])
        self._kernels.attend_blocks(
            q, self._chunks, layer, self._spans, self._scale, self._bias, out, causal=self._causal
        )
        return out.flatten(1)

    def _attend_singles(self, layer: int, q: Tensor) -> Tensor:
        return self._kernels.attend_singles(q, self._singles, self._last, layer, self._scale, self._bias)


class PackedSelfStep:
    """See `AttentionStep`."""

    def __init__(self, kernels: Kernels, pages: Tensor, slots: Tensor, queries: _Queries) -> None:
        self._kernels, self._pages, self._slots, self._queries = kernels, pages, slots, queries

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._kernels.write(k, v, self._pages, self._slots, layer)
        return self._queries.attend(layer, q)


class PackedWriter:
    """See `CrossKeys`."""

    def __init__(self, kernels: Kernels, batch: EncoderBatch, pages: Tensor) -> None:
        self._kernels, self._pages, self._slots = kernels, pages, batch.slot_mapping
        clear_ends(batch, pages)  # for those that pull the blocks, too

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._kernels.write(k, v, self._pages, self._slots, layer)


class PackedBackend:
    """See `EncoderDecoderBackend`."""

    reads_device_lens = True

    def __init__(self, problem: AttentionProblem, kernels: Kernels) -> None:
        assert problem.group_size == 1, f"{problem}: heads share keys"
        self._problem, self._kernels = problem, kernels

    def encoder(self, batch: EncoderBatch, scale: float, bias: Tensor | None) -> PackedEncoderStep:
        return PackedEncoderStep(self._kernels, batch, scale, bias)

    def own(
        self, batch: AttentionBatch, group: int, cache: KvCache, region: str, bias: Tensor | None
    ) -> PackedSelfStep:
        pages, metadata = cache.pages(region), batch.groups[group]
        blocks = Blocks(pages, metadata.block_table)
        last = batch.positions if batch.spans is None else batch.positions[_last_rows(batch.spans)]
        queries = _Queries(self._kernels, self._problem, batch, blocks, last, batch.context_lens, bias, causal=True)
        return PackedSelfStep(self._kernels, pages, metadata.slot_mapping, queries)

    def cross(self, batch: AttentionBatch, fixed: FixedGroupMetadata, cache: KvCache, region: str) -> _Queries:
        """Raises ValueError where the lengths of the encoder inputs are not given."""
        if len(fixed.lens) != batch.num_sequences or min(fixed.lens, default=1) < 1:
            raise ValueError(
                f"encoder lengths {fixed.lens} for {batch.num_sequences} sequences; give one of each, >= 1"
            )
        blocks, last = Blocks(cache.pages(region), fixed.block_table), fixed.lens_on_device() - 1
        return _Queries(self._kernels, self._problem, batch, blocks, last, fixed.lens, None, causal=False)

    def writer(self, batch: EncoderBatch, cache: KvCache, region: str) -> PackedWriter:
        return PackedWriter(self._kernels, batch, cache.pages(region))


def _last_rows(spans: Tensor) -> Tensor:
    """[B]; any row where there are no queries."""
    return (spans.sum(1) - 1).clamp(min=0)

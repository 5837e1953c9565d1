"""The values of one attention step, and what a backend promises. Imports nothing of ours: everyone may hold these.

Shapes: B sequences, T packed tokens of this step, N rows whose logits are wanted, H query heads, K key/value heads,
D head size. Nothing is padded: token t of sequence b is row ``query_starts[b] + t``. Sequences with one query token
come first; the first `num_decodes` rows of T are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GroupMetadata:
    """One KV group in one step. Read only."""

    block_table: Tensor  # [B, max_blocks] int32 or int64, padded with the null block 0
    slot_mapping: Tensor  # [T] int64: block * block_size + offset of each new token


@dataclass(frozen=True, slots=True)
class FixedGroupMetadata:
    """A group that was written once and is only read now, in one step. It shares nothing with the growing groups."""

    block_table: Tensor  # [B, max_blocks] int32 or int64, padded with the null block 0
    lens: list[int]  # [B], each >= 1: tokens that all queries of a sequence see
    device_lens: Tensor | None = None  # [B] int64: the same where the table is, if they are there; these then count

    def lens_on_device(self) -> Tensor:
        """[B] int64. Waits for nothing."""
        if self.device_lens is not None:
            return self.device_lens
        return torch.tensor(self.lens).to(self.block_table.device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class EncoderBatch:
    """Packed encoder inputs, and where a fixed group keeps what decoders read of them. Raises ValueError when the
    lengths do not fit the slots: an input is never guessed by cutting the tokens into equal parts."""

    lens: list[int]  # [B], each >= 1
    slot_mapping: Tensor  # [T] int64: block * block_size + offset of each token

    def __post_init__(self) -> None:
        if min(self.lens, default=0) < 1 or sum(self.lens) != len(self.slot_mapping):
            raise ValueError(f"encoder lengths {self.lens} for {len(self.slot_mapping)} tokens; give one of each, >= 1")

    @property
    def num_tokens(self) -> int:
        return len(self.slot_mapping)

    @property
    def longest(self) -> int:
        return max(self.lens)

    @property
    def starts(self) -> list[int]:
        """[B]: the first row of each input."""
        return list(accumulate(self.lens, initial=0))[:-1]


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One step's packed batch. Built by the rank, read by the model; lists are host copies. B and T may be 0."""

    num_sequences: int
    num_decodes: int  # leading sequences with exactly one query token
    query_lens: list[int]  # [B], each >= 1
    query_starts: list[int]  # [B + 1]
    context_lens: list[int]  # [B]: visible tokens, this step's included
    positions: Tensor  # [T] int64
    groups: tuple[GroupMetadata, ...]  # that grow with their sequences
    logits_rows: Tensor  # [N] int64: rows of T
    fixed: tuple[FixedGroupMetadata, ...] = ()  # groups behind the growing ones
    # [B, 2] int64 on the device: first row and number of queries, 0 where no sequence is. If it is there, the lists do
    # not count, and num_decodes is 0.
    spans: Tensor | None = None
    only_logits: bool = False  # nobody reads hidden states but those of `logits_rows`: a model may return these alone

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1] if self.query_starts else 0

    def rows_read(self) -> Tensor | None:
        """[N] int64, the rows of T that the last layer's KV is not enough of; None: all, or most."""
        return self.logits_rows if self.only_logits and self.num_decodes < self.num_sequences else None


class KvCache:
    """Typed views of one group's regions. Owns nothing: the storage must outlive it.

    `regions[name]` is [num_blocks, num_layers, *page_shape] over the region's storage, null block included, and
    contiguous. K/V pages are [2, K, block_size, D], keys first; rows are [block_size, row_size].
    """

    def __init__(self, regions: Mapping[str, Tensor]) -> None:
        for name, pages in regions.items():
            if not pages.is_contiguous():
                raise ValueError(f"region {name}: the view is not contiguous; view the region's whole storage")
        self.regions = dict(regions)

    def pages(self, region: str) -> Tensor:
        """[num_blocks, num_layers, *page_shape]."""
        return self.regions[region]

    def layer(self, region: str, index: int) -> Tensor:
        """[num_blocks, *page_shape] of one layer, strided by all layers of a block."""
        return self.regions[region][:, index]

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Whole blocks, all regions and layers. Reads every source before it writes any destination."""
        for pages in self.regions.values():
            source = torch.tensor(sources, dtype=torch.int64, device=pages.device)
            destination = torch.tensor(destinations, dtype=torch.int64, device=pages.device)
            pages.index_copy_(0, destination, pages.index_select(0, source))


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem:
    """What is asked of a backend: fixed for the life of a model."""

    kind: str  # "gqa": causal attention over K/V pages; "encoder_decoder": the same, and attention to encoder inputs
    num_heads: int  # H
    num_kv_heads: int  # K; divides H
    head_dim: int  # D
    block_size: int
    dtype: torch.dtype
    scale: float

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


class AttentionStep(Protocol):
    """One step of one group, all layers. Valid until the next `begin`; used by one thread."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes k and v [T, K, D] into the cache of `layer`, then returns the attention of q [T, H, D] as [T, H * D].

        Every query sees all its sequence's tokens up to and including itself, cached ones too.
        """
        ...


class AttentionBackend(Protocol):
    """Made once per model and rank from an `AttentionProblem`."""

    @property
    def name(self) -> str: ...

    def begin(self, batch: AttentionBatch, group: int, cache: KvCache, region: str) -> AttentionStep:
        """Computes once what all layers of the step share. Mutates only blocks that this step starts to write."""
        ...


class EncoderAttention(Protocol):
    """One packed batch of encoder inputs, all layers."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [T, H, D] -> [T, H * D]: every token sees all of its own input and nothing else."""
        ...


class CrossAttention(Protocol):
    """One step of decoder queries over a fixed group, all layers. Nothing is written."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q [T, H, D] -> [T, H * D]: every query sees the whole encoder input of its sequence."""
        ...


class CrossKeys(Protocol):
    """Keeps the keys and values that decoder layers make of encoder states, in the blocks of a fixed group."""

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v [T, H, D] of one decoder layer."""
        ...


class EncoderDecoderBackend(Protocol):
    """The three places where an encoder–decoder model attends. Made once per model and rank."""

    @property
    def reads_device_lens(self) -> bool:
        """Steps of single queries alone, and those with `spans`, look at no length on the host, so that they can be
        replayed; the bias of `own` is then that of all distances that there may be."""
        ...

    def encoder(self, batch: EncoderBatch, scale: float, bias: Tensor | None) -> EncoderAttention:
        """`bias` [H, 2 C - 1], C the longest input: added to the scaled score of the key that stands so far behind the
        query, C - 1 being the query's own."""
        ...

    def own(self, batch: AttentionBatch, group: int, cache: KvCache, region: str, bias: Tensor | None) -> AttentionStep:
        """Of the decoder: causal. `bias` [H, longest context or more]: added to the scaled score of the key that stands
        so far before the query."""
        ...

    def cross(
        self, batch: AttentionBatch, fixed: FixedGroupMetadata, cache: KvCache, region: str
    ) -> CrossAttention: ...

    def writer(self, batch: EncoderBatch, cache: KvCache, region: str) -> CrossKeys: ...

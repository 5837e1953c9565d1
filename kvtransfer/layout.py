"""What a KV block looks like, and which bytes of it a sink rank reads from which source rank. Pure, no torch.

A group has one block table; its regions hold what is cached per block (latents or K/V, indexer keys, draft KV).
On one rank a region is ``uint8 [num_blocks, num_layers, page_bytes]``: all layers of a block lie side by side,
so that a block is one contiguous run. Inside a page:

    ROWS                    [block_size, row_size]                        replicated over tensor-parallel ranks
    KV_HEADS_FIRST          [2, kv_heads, block_size, head_dim]           K then V; heads split over ranks
    FP8_VALUES_THEN_SCALES  [block_size, row_size] fp8, then
                            [block_size, scales_per_row] fp32             replicated
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from hashlib import blake2b

from cluster.hashing import HASH_BYTES

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
}
SCALE_BYTES = 4


class PageFormat(StrEnum):
    ROWS = "rows"
    KV_HEADS_FIRST = "kv_heads_first"
    FP8_VALUES_THEN_SCALES = "fp8_values_then_scales"


@dataclass(frozen=True, slots=True)
class HeadRange:
    """K/V heads [first, first + count) of the whole model that one rank holds."""

    first: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionSpec:
    """The logical, unsharded region. Sizes in elements unless named otherwise.

    Raises ValueError, naming the field, when the sizes do not fit the page format.
    """

    name: str
    num_layers: int
    page_format: PageFormat
    dtype: str
    block_size: int
    row_size: int = 0  # ROWS, FP8_VALUES_THEN_SCALES
    kv_heads: int = 0  # KV_HEADS_FIRST: of the whole model
    head_dim: int = 0  # KV_HEADS_FIRST
    scales_per_row: int = 0  # FP8_VALUES_THEN_SCALES
    travels: bool = True  # read by sinks; otherwise each worker makes its own of what the group's other regions bring

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"region {self.name}: dtype {self.dtype!r} is none of {', '.join(ITEM_BYTES)}")
        needed = {
            PageFormat.ROWS: ("row_size",),
            PageFormat.KV_HEADS_FIRST: ("kv_heads", "head_dim"),
            PageFormat.FP8_VALUES_THEN_SCALES: ("row_size", "scales_per_row"),
        }[self.page_format]
        for name in ("num_layers", "block_size", *needed):
            if getattr(self, name) < 1:
                raise ValueError(f"region {self.name}: {name} = {getattr(self, name)}; {self.page_format} needs >= 1")
        for name in {"row_size", "kv_heads", "head_dim", "scales_per_row"} - set(needed):
            if getattr(self, name):
                raise ValueError(f"region {self.name}: {self.page_format} has no {name}; leave it out")
        if self.page_format is PageFormat.FP8_VALUES_THEN_SCALES and ITEM_BYTES[self.dtype] != 1:
            raise ValueError(f"region {self.name}: {self.page_format} holds one-byte values, not {self.dtype}")

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def replicated(self) -> bool:
        """Whether every tensor-parallel rank holds the same bytes."""
        return self.page_format is not PageFormat.KV_HEADS_FIRST

    @property
    def head_bytes(self) -> int:
        """One K or V head of one block and layer: [block_size, head_dim]."""
        return self.block_size * self.head_dim * self.item_bytes

    def heads_of(self, tp_rank: int, tp_size: int) -> HeadRange:
        """The heads of a rank; with more ranks than heads, neighbouring ranks hold the same one.

        Raises ValueError when neither divides the other.
        """
        if tp_size <= self.kv_heads and self.kv_heads % tp_size == 0:
            count = self.kv_heads // tp_size
            return HeadRange(tp_rank * count, count)
        if tp_size > self.kv_heads and tp_size % self.kv_heads == 0:
            return HeadRange(tp_rank // (tp_size // self.kv_heads), 1)
        raise ValueError(
            f"region {self.name}: {self.kv_heads} K/V heads cannot be split over {tp_size} tensor-parallel ranks; "
            "one must divide the other"
        )

    def page_bytes(self, tp_size: int = 1) -> int:
        """Bytes of one block and layer on one rank."""
        if self.page_format is PageFormat.KV_HEADS_FIRST:
            return 2 * self.heads_of(0, tp_size).count * self.head_bytes
        values = self.block_size * self.row_size * self.item_bytes
        return values + self.block_size * self.scales_per_row * SCALE_BYTES

    def block_bytes(self, tp_size: int = 1) -> int:
        """Bytes of one block on one rank, all layers."""
        return self.num_layers * self.page_bytes(tp_size)


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Regions under one block table. Raises ValueError when a region has another block size or a name twice, and when
    none of them travels."""

    name: str
    block_size: int
    regions: tuple[RegionSpec, ...]

    def __post_init__(self) -> None:
        names = [region.name for region in self.regions]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"group {self.name}: regions {names}; name at least one, and each once")
        for region in self.regions:
            if region.block_size != self.block_size:
                raise ValueError(
                    f"group {self.name}: region {region.name} has blocks of {region.block_size} tokens, "
                    f"the group of {self.block_size}"
                )
        if not self.travelling:
            raise ValueError(f"group {self.name}: none of the regions {names} travels; let one of them")

    @property
    def travelling(self) -> tuple[RegionSpec, ...]:
        """What sinks read of a block."""
        return tuple(region for region in self.regions if region.travels)

    def block_bytes(self, tp_size: int = 1) -> int:
        """Bytes of one block on one rank over all regions."""
        return sum(region.block_bytes(tp_size) for region in self.regions)


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """The logical KV of a model: equal on all workers that exchange blocks, whatever their parallel layout."""

    groups: tuple[GroupSpec, ...]
    rope_convention: str  # of cached keys: "interleaved", "half_split", "none"
    layout_version: int = 1

    def canonical(self) -> str:
        """One line of JSON; equal exactly when the geometries are."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))


def compatibility_hash(weights_identity: bytes, model_config_json: str, dtype: str, geometry: KvGeometry) -> bytes:
    """16 bytes that two workers share exactly when one may read the other's blocks.

    Covers the logical, unsharded geometry: the parallel layout feeds `reshard_plan` instead. The order of keys in
    `model_config_json` does not matter.
    """
    config = json.dumps(json.loads(model_config_json), sort_keys=True, separators=(",", ":"))
    digest = blake2b(digest_size=HASH_BYTES, person=b"sluice.compat")
    for part in (weights_identity, config.encode(), dtype.encode(), geometry.canonical().encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class RankLayout:
    """`rank` names the process in offers and Done values; (tp_rank, tp_size) say which heads it holds."""

    rank: int
    tp_rank: int = 0
    tp_size: int = 1


@dataclass(frozen=True, slots=True)
class Slice:
    """`num_bytes` at `source_offset` of a block on `source_rank` belong at `sink_offset` of the sink's block."""

    source_rank: int
    source_offset: int
    sink_offset: int
    num_bytes: int


def reshard_plan(region: RegionSpec, sources: Sequence[RankLayout], sink: RankLayout) -> tuple[Slice, ...]:
    """The slices that together fill one block of `region` on the sink rank, in the order of sink offsets.

    Equal layouts give one slice, the whole block. Replicated regions, and heads that several source ranks hold, are
    read from one source rank, chosen by the sink's rank so that the load spreads. `sources` are all ranks of one
    shard. Raises ValueError when the sources lack a head or disagree on tp_size.
    """
    if not sources:
        raise ValueError(f"region {region.name}: no source ranks")
    if len({source.tp_size for source in sources}) > 1:
        raise ValueError(f"region {region.name}: source ranks of different tp sizes: {list(sources)}")
    ordered = sorted(sources, key=lambda source: source.tp_rank)
    if region.replicated:
        return (Slice(ordered[sink.tp_rank % len(ordered)].rank, 0, 0, region.block_bytes()),)

    wanted = region.heads_of(sink.tp_rank, sink.tp_size)
    runs: list[tuple[RankLayout, HeadRange, HeadRange]] = []  # source, its heads, the run of heads read from it
    head = wanted.first
    while head < wanted.first + wanted.count:
        source = _holder(region, ordered, sink, head)
        held = region.heads_of(source.tp_rank, source.tp_size)
        end = min(held.first + held.count, wanted.first + wanted.count)
        runs.append((source, held, HeadRange(head, end - head)))
        head = end

    slices: list[Slice] = []
    for layer in range(region.num_layers):
        for half in range(2):  # K, V
            for source, held, run in runs:
                piece = Slice(
                    source.rank,
                    ((layer * 2 + half) * held.count + run.first - held.first) * region.head_bytes,
                    ((layer * 2 + half) * wanted.count + run.first - wanted.first) * region.head_bytes,
                    run.count * region.head_bytes,
                )
                joined = _joined(slices[-1], piece) if slices else None
                if joined:
                    slices[-1] = joined
                else:
                    slices.append(piece)
    return tuple(slices)


def _holder(region: RegionSpec, ordered: Sequence[RankLayout], sink: RankLayout, head: int) -> RankLayout:
    holders: list[RankLayout] = []
    for source in ordered:
        held = region.heads_of(source.tp_rank, source.tp_size)
        if held.first <= head < held.first + held.count:
            if (source.tp_rank, source.tp_size) == (sink.tp_rank, sink.tp_size):
                return source
            holders.append(source)
    if not holders:
        raise ValueError(f"region {region.name}: no source rank of {list(ordered)} holds K/V head {head}")
    return holders[sink.tp_rank % len(holders)]


def _joined(left: Slice, right: Slice) -> Slice | None:
    touching = (
        left.source_rank == right.source_rank
        and left.source_offset + left.num_bytes == right.source_offset
        and left.sink_offset + left.num_bytes == right.sink_offset
    )
    if not touching:
        return None
    return Slice(left.source_rank, left.source_offset, left.sink_offset, left.num_bytes + right.num_bytes)

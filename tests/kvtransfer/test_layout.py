"""Layout: page sizes, the compatibility hash, and that a reshard moves every byte of a block exactly once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.layout import (
    GroupSpec,
    KvGeometry,
    PageFormat,
    RankLayout,
    RegionSpec,
    compatibility_hash,
    reshard_plan,
)

LATENTS = RegionSpec(
    name="latents", num_layers=3, page_format=PageFormat.ROWS, dtype="bfloat16", block_size=4, row_size=9
)
HEADS = RegionSpec(
    name="kv",
    num_layers=2,
    page_format=PageFormat.KV_HEADS_FIRST,
    dtype="float16",
    block_size=2,
    kv_heads=4,
    head_dim=3,
)
INDEXER = RegionSpec(
    name="indexer",
    num_layers=3,
    page_format=PageFormat.FP8_VALUES_THEN_SCALES,
    dtype="float8_e4m3fn",
    block_size=4,
    row_size=8,
    scales_per_row=1,
)


def geometry(*regions: RegionSpec) -> KvGeometry:
    return KvGeometry((GroupSpec("self", regions[0].block_size, regions),), rope_convention="interleaved")


def shard(region: RegionSpec, whole: np.ndarray, tp_rank: int, tp_size: int) -> np.ndarray:
    """What a rank holds of a block [num_layers, 2, kv_heads, block_size * head_dim], written without the plan."""
    if tp_size <= region.kv_heads:
        return np.split(whole, tp_size, axis=2)[tp_rank]
    return whole[:, :, [tp_rank * region.kv_heads // tp_size]]


@st.composite
def head_layouts(draw: st.DrawFn) -> tuple[RegionSpec, int, int]:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    sizes = [n for n in range(1, 17) if heads % n == 0 or n % heads == 0]
    region = RegionSpec(
        name="kv",
        num_layers=draw(st.integers(1, 3)),
        page_format=PageFormat.KV_HEADS_FIRST,
        dtype="uint8",
        block_size=draw(st.integers(1, 3)),
        kv_heads=heads,
        head_dim=draw(st.integers(1, 3)),
    )
    return region, draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))


@given(head_layouts(), st.randoms(use_true_random=False))
def test_reshard_moves_every_byte_of_a_heads_block_exactly_once(case, random) -> None:
    region, source_tp, sink_tp = case
    shape = (region.num_layers, 2, region.kv_heads, region.block_size * region.head_dim)
    whole = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)  # a distinct mark per byte
    sources = [RankLayout(100 + r, r, source_tp) for r in range(source_tp)]
    random.shuffle(sources)
    for tp_rank in range(sink_tp):
        wanted = shard(region, whole, tp_rank, sink_tp).ravel()
        assert wanted.size == region.block_bytes(sink_tp)
        arrived = np.full(wanted.size, -1, np.int64)
        writes = np.zeros(wanted.size, np.int64)
        for piece in reshard_plan(region, sources, RankLayout(0, tp_rank, sink_tp)):
            held = shard(region, whole, piece.source_rank - 100, source_tp).ravel()
            assert piece.source_offset + piece.num_bytes <= held.size == region.block_bytes(source_tp)
            into = slice(piece.sink_offset, piece.sink_offset + piece.num_bytes)
            arrived[into] = held[piece.source_offset : piece.source_offset + piece.num_bytes]
            writes[into] += 1
        assert (writes == 1).all()
        assert (arrived == wanted).all()


@given(head_layouts())
def test_equal_layouts_read_the_whole_block_from_their_own_rank(case) -> None:
    region, tp_size, _ = case
    sources = [RankLayout(r, r, tp_size) for r in range(tp_size)]
    for rank in range(tp_size):
        (piece,) = reshard_plan(region, sources, RankLayout(7, rank, tp_size))
        assert (piece.source_rank, piece.source_offset, piece.sink_offset) == (rank, 0, 0)
        assert piece.num_bytes == region.block_bytes(tp_size)


@pytest.mark.parametrize("region", [LATENTS, INDEXER])
def test_replicated_regions_are_read_from_one_rank_spread_by_the_sinks(region: RegionSpec) -> None:
    sources = [RankLayout(r, r, 4) for r in range(4)]
    plans = [reshard_plan(region, sources, RankLayout(r, r, 8)) for r in range(8)]
    assert all(len(plan) == 1 and plan[0].num_bytes == region.block_bytes(8) for plan in plans)
    assert [plan[0].source_rank for plan in plans] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_heads_held_by_several_ranks_are_spread_over_them() -> None:
    region = replace(HEADS, kv_heads=1)
    sources = [RankLayout(r, r, 4) for r in range(4)]
    chosen = {reshard_plan(region, sources, RankLayout(r, r, 2))[0].source_rank for r in range(2)}
    assert len(chosen) == 2


def test_page_and_block_bytes() -> None:
    assert LATENTS.page_bytes(1) == LATENTS.page_bytes(8) == 4 * 9 * 2
    assert LATENTS.block_bytes() == 3 * 4 * 9 * 2
    assert [HEADS.page_bytes(tp) for tp in (1, 2, 4, 8)] == [2 * n * 2 * 3 * 2 for n in (4, 2, 1, 1)]
    assert INDEXER.page_bytes(2) == 4 * 8 + 4 * 4
    assert GroupSpec("self", 4, (LATENTS, INDEXER)).block_bytes() == LATENTS.block_bytes() + INDEXER.block_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int3"}, "'int3'"),
        ({"row_size": 0}, "row_size = 0"),
        ({"kv_heads": 2}, "kv_heads"),
        ({"num_layers": 0}, "num_layers = 0"),
    ],
)
def test_a_region_that_does_not_fit_its_format_names_the_field(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LATENTS, **changes)


def test_of_a_group_some_region_travels() -> None:
    at_home = replace(INDEXER, travels=False)
    assert GroupSpec("self", 4, (LATENTS, at_home)).travelling == (LATENTS,)
    with pytest.raises(ValueError, match=r"group self: none of the regions \['indexer'\] travels"):
        GroupSpec("self", 4, (at_home,))


def test_heads_that_do_not_split_name_both_numbers() -> None:
    with pytest.raises(ValueError, match="4 K/V heads cannot be split over 3"):
        HEADS.page_bytes(3)


def test_sources_that_lack_a_head_are_refused() -> None:
    with pytest.raises(ValueError, match="holds K/V head 2"):
        reshard_plan(HEADS, [RankLayout(0, 0, 2)], RankLayout(0, 0, 1))
    with pytest.raises(ValueError, match="different tp sizes"):
        reshard_plan(HEADS, [RankLayout(0, 0, 2), RankLayout(1, 1, 4)], RankLayout(0, 0, 1))


BASE = (b"weights", '{"a": 1, "b": 2}', "bfloat16", geometry(LATENTS, INDEXER))


def test_compatibility_hash_ignores_the_order_of_config_keys() -> None:
    assert len(compatibility_hash(*BASE)) == 16
    assert compatibility_hash(*BASE) == compatibility_hash(b"weights", '{"b":2,"a":1}', *BASE[2:])


@pytest.mark.parametrize(
    "other",
    [
        (b"weightz", *BASE[1:]),
        (*BASE[:1], '{"a": 1, "b": 3}', *BASE[2:]),
        (*BASE[:2], "float16", BASE[3]),
        (*BASE[:3], geometry(LATENTS)),
        (*BASE[:3], geometry(LATENTS, replace(INDEXER, travels=False))),
        (*BASE[:3], geometry(replace(LATENTS, row_size=10), INDEXER)),
        (*BASE[:3], geometry(replace(LATENTS, block_size=8), replace(INDEXER, block_size=8))),
        (*BASE[:3], replace(BASE[3], rope_convention="half_split")),
        (*BASE[:3], replace(BASE[3], layout_version=2)),
    ],
)
def test_compatibility_hash_tells_apart_whatever_makes_blocks_unreadable(other) -> None:
    assert compatibility_hash(*other) != compatibility_hash(*BASE)

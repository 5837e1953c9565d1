"""How the contexts of a step are cut: each tile is in one run, and no two parts in one place."""

from __future__ import annotations

import random

import pytest
import torch

from workers.kernels.tactics import RunsTactic

pytestmark = pytest.mark.gpu


def check(lengths: list[int], tile: int, programs: int) -> list[list[int]]:
    """By sequence, the run of each tile."""
    from workers.kernels.context_runs import cut_contexts

    positions = torch.tensor(lengths, device="cuda") - 1
    cut = cut_contexts(positions, 1, RunsTactic(programs, tile, 4, 3))
    bounds = cut.bounds.tolist()
    runs_of: list[list[int]] = [[] for _ in lengths]  # by sequence, the run of each tile
    places: set[int] = set()
    for run, (first, last, begin, end) in enumerate(cut.runs.tolist()):
        for sequence in range(first, last + 1):
            num_tiles = -(-lengths[sequence] // tile)
            low = begin if sequence == first else 0
            high = end if sequence == last else num_tiles
            assert low == len(runs_of[sequence]) < high <= num_tiles
            runs_of[sequence] += [run] * (high - low)
            assert run + sequence not in places
            places.add(run + sequence)
    assert [len(runs) for runs in runs_of] == [-(-length // tile) for length in lengths]
    for runs, (first, last) in zip(runs_of, bounds, strict=True):
        assert sorted({*runs}) == [*range(first, last + 1)]
    assert max(places) < len(cut.runs) + len(lengths) - 1, "as many as there is room for"
    return runs_of


@pytest.mark.parametrize("seed", range(20))
def test_each_tile_of_each_context_is_in_one_run(seed: int) -> None:
    draw = random.Random(seed)
    count, tile = draw.choice([1, 2, 7, 33, 130, 300]), draw.choice([16, 32, 64])
    lengths = [draw.choice([1, draw.randint(1, 100), draw.randint(1, 4000)]) for _ in range(count)]
    check(lengths, tile, draw.choice([1, 5, 132, 264]))


@pytest.mark.parametrize(
    ("count", "programs", "pieces"), [(128, 264, 2), (8, 132, 16), (128, 66, 1), (131, 66, 1), (300, 66, 1)]
)
def test_contexts_about_as_long_as_each_other_are_cut_where_they_end(count: int, programs: int, pieces: int) -> None:
    runs_of = check([2048 + index % 40 for index in range(count)], 32, programs)
    assert {len({*runs}) for runs in runs_of} == {pieces}


@pytest.mark.parametrize(
    ("lengths", "pieces"), [([2000] * 60 + [1, 1], {2000: 4, 1: 1}), ([100] * 10, {100: 2}), ([1] * 200, {1: 1})]
)
def test_short_ones_are_not_cut(lengths: list[int], pieces: dict[int, int]) -> None:
    for length, runs in zip(lengths, check(lengths, 32, 264), strict=True):
        assert len({*runs}) == pieces[length]

"""How the contexts of a step are cut: each tile is in one run, and no two parts in one place."""

from __future__ import annotations

import random

import pytest
import torch

from workers.kernels.tactics import LatentTactic

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("seed", range(20))
def test_each_tile_of_each_context_is_in_one_run(seed: int) -> None:
    from workers.kernels.latent_decode import cut_contexts

    draw = random.Random(seed)
    count, tile = draw.choice([1, 2, 7, 33, 130, 300]), draw.choice([16, 32, 64])
    lengths = [draw.choice([1, draw.randint(1, 100), draw.randint(1, 4000)]) for _ in range(count)]
    positions = torch.tensor(lengths, device="cuda") - 1
    cut = cut_contexts(positions, 16, LatentTactic(draw.choice([1, 5, 132, 264]), tile, 4, 3))
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
    assert max(places) < len(cut.runs) + count - 1, "as many as there is room for"

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from cluster.request import Pooling
from workers.engine.pooling import PooledRow, Pooler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_over_chunks_is_the_mean_in_float32_of_the_whole(dtype: torch.dtype) -> None:
    hidden = torch.randn(700, 6).to(dtype)
    pooler = Pooler()
    edges = [0, 1, 300, 301, 700]
    vectors: dict[int, torch.Tensor] = {}
    for start, end in pairwise(edges):
        step = torch.cat([torch.full((3, 6), 1e6, dtype=dtype), hidden[start:end]])  # others' rows come first
        assert vectors == {}
        vectors = pooler.pool(step, [PooledRow(1, Pooling.MEAN, 3, 3 + end - start, start, end == 700)])
    assert vectors[1].dtype is torch.float32
    torch.testing.assert_close(vectors[1], hidden.float().mean(0))


def test_a_prompt_that_begins_again_forgets_what_it_had_summed() -> None:
    pooler = Pooler()
    ones = torch.ones(4, 2)
    pooler.pool(ones, [PooledRow(1, Pooling.MEAN, 0, 4, 0, False)])
    assert pooler.pool(2 * ones, [PooledRow(1, Pooling.MEAN, 0, 4, 0, False)]) == {}
    vectors = pooler.pool(4 * ones, [PooledRow(1, Pooling.MEAN, 0, 4, 4, True)])
    assert vectors[1].tolist() == [3.0, 3.0]
    pooler.forget([1, 99])
    with pytest.raises(KeyError):
        pooler.pool(ones, [PooledRow(1, Pooling.MEAN, 0, 4, 4, True)])


def test_the_last_hidden_state_is_that_of_the_last_chunk() -> None:
    hidden = torch.arange(12.0).reshape(6, 2)
    pooler = Pooler()
    assert pooler.pool(hidden, [PooledRow(1, Pooling.LAST, 0, 3, 0, False)]) == {}
    vectors = pooler.pool(
        hidden, [PooledRow(1, Pooling.LAST, 1, 4, 3, True), PooledRow(2, Pooling.LAST, 4, 6, 0, True)]
    )
    assert {id_: vector.tolist() for id_, vector in vectors.items()} == {1: [6.0, 7.0], 2: [10.0, 11.0]}

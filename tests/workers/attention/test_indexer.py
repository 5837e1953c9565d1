"""Index scores written out, and choices as sets modulo ties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.attention import indexer
from workers.attention.indexer import index_scores, select


@pytest.mark.parametrize(("b", "n"), [(1, 1), (5, 1), (1, 6)])
@pytest.mark.parametrize("limit", [1 << 24, 60])
def test_scores(b: int, n: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece or in many."""
    monkeypatch.setattr(indexer, "MAX_SCORES", limit)
    generator = torch.Generator().manual_seed(b + n)
    queries = torch.randn(b, n, 3, 8, generator=generator)
    weights = torch.randn(b, n, 3, generator=generator)
    keys = torch.randn(b, 10, 8, generator=generator)
    dots = torch.einsum("bnij,bcj->bnic", queries, keys).relu()
    wanted = torch.einsum("bni,bnic->bnc", weights, dots)
    torch.testing.assert_close(index_scores(queries, weights, keys), wanted, rtol=1e-5, atol=1e-5)


def test_garbage_behind_the_context_stays_in_its_column() -> None:
    keys = torch.randn(2, 6, 8)
    keys[0, 4:] = torch.nan
    scores = index_scores(torch.randn(2, 1, 3, 8), torch.randn(2, 1, 3), keys).squeeze(1)
    assert scores[0, :4].isfinite().all() and scores[1].isfinite().all()
    chosen = select(scores, torch.tensor([4, 6]), 5)
    assert sorted(chosen[0].tolist()) == [-1, 0, 1, 2, 3] and -1 not in chosen[1].tolist()


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=5),
    st.lists(st.integers(1, 7), min_size=5, max_size=5),
    st.integers(1, 9),
)
def test_a_choice_holds_the_best_that_the_query_sees(rows: list[list[int]], visible: list[int], topk: int) -> None:
    scores, visible = torch.tensor(rows, dtype=torch.float32), visible[: len(rows)]
    chosen = select(scores.clone(), torch.tensor(visible), topk)
    for row, seen, best in zip(scores.tolist(), visible, chosen.tolist(), strict=True):
        taken = [position for position in best if position >= 0]
        assert best[0] >= 0 and len(set(taken)) == len(taken) == min(topk, seen)
        assert all(position < seen for position in taken)
        # Equal scores may stand for each other.
        assert sorted(row[position] for position in taken) == sorted(row[:seen])[seen - len(taken) :]

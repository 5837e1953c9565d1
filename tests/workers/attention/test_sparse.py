"""Attention over chosen rows against the softmax written out."""

import pytest
import torch

from workers.attention import sparse
from workers.attention.sparse import attend_chosen


@pytest.mark.parametrize("limit", [1 << 24, 40])
def test_chosen_rows(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "MAX_GATHERED", limit)
    generator = torch.Generator().manual_seed(0)
    queries, rows = torch.randn(5, 3, 10, generator=generator), torch.randn(30, 10, generator=generator)
    rows[13] = torch.nan  # nobody's choice
    chosen = torch.tensor([[1, 2, 3, 4], [5, -1, -1, -1], [29, 0, 7, -1], [6, 8, 9, 10], [2, 1, -1, -1]])
    got = attend_chosen(queries, rows, chosen, latent_size=6, scale=0.3)
    for p, choice in enumerate(chosen.tolist()):
        mine = rows[[row for row in choice if row >= 0]]
        wanted = (queries[p] @ mine.T * 0.3).softmax(-1) @ mine[:, :6]
        torch.testing.assert_close(got[p], wanted, rtol=1e-5, atol=1e-5)

"""Parts of a context, merged, are the whole; logarithms are natural."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.attention.merging import attend_part, merge


@settings(max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 1000))
def test_any_cut_gives_the_same(sizes: list[int], num_queries: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cached = sum(sizes)
    q = torch.randn(num_queries, 2, 8, generator=generator) * 3
    k = torch.randn(cached + num_queries, 2, 8, generator=generator)
    v = torch.randn(cached + num_queries, 2, 5, generator=generator)
    scores = torch.einsum("nhd,chd->hnc", q, k) * 0.5
    visible = torch.arange(cached + num_queries) <= torch.arange(cached, cached + num_queries)[:, None]
    scores = scores.masked_fill(~visible, float("-inf"))
    wanted = torch.einsum("hnc,chv->nhv", scores.softmax(-1), v)
    merged = attend_part(q, k[cached:], v[cached:], scale=0.5, causal=True)
    for end, size in zip(torch.tensor(sizes).cumsum(0).tolist(), sizes, strict=True):
        part = attend_part(q, k[end - size : end], v[end - size : end], scale=0.5, causal=False)
        merged = merge(part, merged)
    torch.testing.assert_close(merged.out, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged.lse, scores.logsumexp(-1).T, rtol=1e-5, atol=1e-5)

"""Sizes that steps are captured at."""

from __future__ import annotations

from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st

from workers.engine.cuda_graph import default_sizes


@given(st.integers(1, 2000), st.sampled_from([1, 2, 8]))
def test_a_step_is_padded_by_an_eighth_at_most(max_sequences: int, least_step: int) -> None:
    sizes = default_sizes(max_sequences, least_step=least_step)
    assert sizes == sorted({*sizes}) and sizes[-2:-1] < [max_sequences] <= sizes[-1:]
    for count in range(1, max_sequences + 1):
        padding = sizes[bisect_left(sizes, count)] - count
        assert padding < max(least_step, -(-count // 8) + 1)


def test_few_sequences_are_never_padded_and_many_have_few_sizes() -> None:
    assert default_sizes(17) == [*range(1, 17), 18]
    assert len(default_sizes(256)) == 48
    assert default_sizes(40, least_step=8) == [*range(1, 9), 16, 24, 32, 40]

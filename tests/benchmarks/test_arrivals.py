from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.arrivals import Workload

WORKLOAD = Workload(rate=5.0, num_requests=200, prompt_tokens=(3, 9), output_tokens=(1, 4), vocab_size=400, seed=1)


@given(seed=st.integers(0, 2**64), rate=st.floats(0.1, 1000), count=st.integers(1, 50))
def test_arrivals_follow_from_the_seed_and_stay_in_their_span(seed: int, rate: float, count: int) -> None:
    workload = replace(WORKLOAD, seed=seed, rate=rate, num_requests=count)
    arrivals = workload.arrivals()
    assert arrivals == workload.arrivals()
    assert len(arrivals) == count
    times = [arrival.at_s for arrival in arrivals]
    assert times == sorted(times)
    assert times[0] >= 0 and times[-1] <= count / rate
    assert all(3 <= len(a.prompt) <= 9 and 1 <= a.num_tokens <= 4 for a in arrivals)
    assert all(0 <= token < 400 for a in arrivals for token in a.prompt)


def test_lengths_use_their_whole_range() -> None:
    arrivals = WORKLOAD.arrivals()
    assert {len(arrival.prompt) for arrival in arrivals} == set(range(3, 10))
    assert {arrival.num_tokens for arrival in arrivals} == {1, 2, 3, 4}


@pytest.mark.parametrize("change", [{"seed": 2}, {"rate": 6.0}])
def test_another_seed_or_rate_has_other_prompts(change: dict[str, float]) -> None:
    prompts = {tuple(arrival.prompt) for arrival in WORKLOAD.arrivals()}
    others = {tuple(arrival.prompt) for arrival in replace(WORKLOAD, **change).arrivals()}  # type: ignore[arg-type]
    assert len(prompts) == WORKLOAD.num_requests
    assert prompts.isdisjoint(others)


def test_without_a_rate_nothing_waits() -> None:
    assert {arrival.at_s for arrival in replace(WORKLOAD, rate=0.0).arrivals()} == {0.0}

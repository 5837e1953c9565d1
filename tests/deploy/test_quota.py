"""What a key may still do: rates, open requests, and its part where several replicas are alive."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import Busy
from cluster.metrics import Metrics
from deploy.api_keys import ApiKey, KeyLimits
from deploy.quota import Bucket, Quotas, Visit


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(clock: Clock) -> Quotas:
    return Quotas(Metrics(), clock)


def ann(limits: KeyLimits) -> ApiKey:
    return ApiKey("ann", limits)


def refused(quotas: Quotas, wanted: ApiKey) -> tuple[str, float]:
    with pytest.raises(Busy) as error:
        quotas.enter(wanted)
    return error.value.limit, round(error.value.retry_after_s, 6)


def test_requests_are_let_in_evenly_after_a_burst(quotas: Quotas, clock: Clock) -> None:
    key = ann(KeyLimits(requests_per_minute=6))
    for _ in range(6):
        quotas.enter(key)
    assert refused(quotas, key) == ("key_requests_per_minute", 10.0)
    clock.now += 9
    assert refused(quotas, key) == ("key_requests_per_minute", 1.0)  # a refusal costs nothing
    clock.now += 1
    quotas.enter(key)
    assert refused(quotas, key) == ("key_requests_per_minute", 10.0)
    quotas.enter(ApiKey("bob"))


def test_tokens_may_be_overdrawn_and_are_made_good(quotas: Quotas, clock: Clock) -> None:
    key = ann(KeyLimits(tokens_per_minute=600))
    visit = quotas.enter(key)
    visit.spend(599)
    quotas.enter(key).spend(301)  # it had one left
    assert refused(quotas, key) == ("key_tokens_per_minute", 30.1)
    clock.now += 30.2
    quotas.enter(key)
    clock.now += 1e6
    quotas.enter(key).spend(600)  # no more than a minute's worth is saved
    assert refused(quotas, key) == ("key_tokens_per_minute", 0.1)


def test_open_requests_are_counted_until_they_leave(quotas: Quotas) -> None:
    key = ann(KeyLimits(max_concurrent=2))
    first, _ = quotas.enter(key), quotas.enter(key)
    assert refused(quotas, key)[0] == "key_max_concurrent"
    first.leave()
    first.leave()  # once
    quotas.enter(key)
    assert refused(quotas, key)[0] == "key_max_concurrent"


def test_replicas_divide_the_limits(quotas: Quotas) -> None:
    quotas.set_replicas(4)
    key = ann(KeyLimits(requests_per_minute=8, max_concurrent=100))
    quotas.enter(key)
    quotas.enter(key)
    assert refused(quotas, key) == ("key_requests_per_minute", 30.0)
    single = ApiKey("bob", KeyLimits(max_concurrent=1))
    quotas.enter(single)  # never less than one
    with pytest.raises(Busy, match=r"limit of 1 requests at once \(divided by 4 replicas\) is reached"):
        quotas.enter(single)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=60), st.integers(1, 40))
def test_no_minute_sees_more_than_two_minutes_worth(steps: list[tuple[float, int]], per_minute: int) -> None:
    """A full bucket and what fills it meanwhile: the bound of every token bucket. And who waits as told gets in."""
    bucket, now = Bucket(0.0), 0.0
    taken: list[tuple[float, int]] = []
    for pause_s, needed in steps:
        now += pause_s
        needed = min(needed, per_minute)
        wait_s = bucket.wait_s(needed, per_minute, now)
        if wait_s:
            assert bucket.wait_s(needed, per_minute, now + wait_s + 1e-6) == 0
            now += wait_s + 1e-6
        bucket.take(needed)
        taken.append((now, needed))
    for start, _ in taken:
        assert sum(amount for at, amount in taken if start <= at < start + 60) <= 2 * per_minute + 1e-3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), max_size=40), st.integers(1, 5))
def test_never_more_are_open_than_allowed(steps: list[bool], limit: int) -> None:
    quotas, key = Quotas(Metrics(), lambda: 0.0), ann(KeyLimits(max_concurrent=limit))
    visits: list[Visit] = []
    for comes in steps:
        if comes and len(visits) < limit:
            visits.append(quotas.enter(key))
        elif comes:
            assert refused(quotas, key)[0] == "key_max_concurrent"
        elif visits:
            visits.pop().leave()

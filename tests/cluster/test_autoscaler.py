"""Sizes and roles of pools, against a fluid model of prompts and streams: no sockets, no clock but the model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscaler import PoolLimits, PoolLoad, PoolState, Targets, WorkerLoad, resize
from cluster.config import Role

PREFILL, DECODE = frozenset({Role.PREFILL}), frozenset({Role.DECODE})
BOTH = PREFILL | DECODE
TARGETS = Targets(ttft_s=1.0, inter_token_s=0.05, utilization=0.7, up_after_s=3.0, down_after_s=60.0)
START_S = 20.0  # of a new worker
HOUR = 3600.0


@dataclass
class Fluid:
    """One pool. Prompts are seconds of work that any worker takes from one queue; streams are shares of a worker."""

    limits: PoolLimits
    prompts: Callable[[float], float] = lambda _: 0.0  # seconds of work per second
    streams: Callable[[float], float] = lambda _: 0.0  # workers that they fill
    step_s: float = 1.0
    start_s: float = START_S
    now: float = 0.0
    backlog_s: float = 0.0
    state: PoolState = field(init=False)
    ready_at: list[float] = field(default_factory=list)
    sizes: list[tuple[float, int]] = field(default_factory=list)  # changes: when, to what
    worst_wait_s: float = 0.0
    worker_s: float = 0.0

    def __post_init__(self) -> None:
        self.state = PoolState(size=self.limits.min_workers)
        self.ready_at = [0.0] * self.state.size

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.step()

    def step(self) -> None:
        self.now += self.step_s
        roles = [self.state.roles(index, self.limits) for index, at in enumerate(self.ready_at) if at <= self.now]
        num_prefill = sum(Role.PREFILL in each for each in roles)
        num_decode = sum(Role.DECODE in each for each in roles)
        work = self.backlog_s + self.prompts(self.now) * self.step_s
        done = min(work, num_prefill * self.step_s)
        self.backlog_s = work - done
        wait_s = self.backlog_s / num_prefill if num_prefill else 0.0
        self.worst_wait_s = max(self.worst_wait_s, wait_s)
        self.worker_s += self.state.size * self.step_s
        filled = self.streams(self.now) / num_decode if num_decode else 0.0
        load = PoolLoad(
            workers=tuple(
                WorkerLoad(
                    roles=each,
                    busy=done / num_prefill / self.step_s if Role.PREFILL in each else 0.0,
                    backlog_s=wait_s if Role.PREFILL in each else 0.0,
                    queue_s=wait_s,
                    occupancy=filled if Role.DECODE in each else 0.0,
                    inter_token_s=0.02 * max(1.0, filled),
                )
                for each in roles
            ),
            num_pending=self.state.size - len(roles),
        )
        before = self.state.size
        self.state = resize({"p": self.state}, {"p": load}, {"p": self.limits}, TARGETS, self.now)["p"]
        if self.state.size != before:
            self.sizes.append((self.now, self.state.size))
        del self.ready_at[self.state.size :]
        self.ready_at += [self.now + self.start_s] * (self.state.size - len(self.ready_at))


def turns(pool: Fluid) -> int:
    """How often it shrank after it had grown, or grew after it had shrunk."""
    sizes = [size for _, size in pool.sizes]
    return sum((b - a) * (c - b) < 0 for a, b, c in zip(sizes, sizes[1:], sizes[2:], strict=False))


def limits(low: int = 1, high: int = 16, roles: frozenset[Role] = PREFILL, *, switches: bool = False) -> PoolLimits:
    return PoolLimits(roles=roles, min_workers=low, max_workers=high, switches=switches)


loads = st.builds(
    WorkerLoad,
    roles=st.sampled_from([PREFILL, DECODE, BOTH]),
    busy=st.floats(0, 1),
    backlog_s=st.floats(0, 1000),
    queue_s=st.floats(0, 1000),
    occupancy=st.floats(0, 10),
    inter_token_s=st.floats(0, 1),
)
pool_loads = st.builds(PoolLoad, workers=st.lists(loads, max_size=6).map(tuple), num_pending=st.integers(0, 4))


@settings(max_examples=200)
@given(st.lists(st.tuples(pool_loads, st.floats(0.5, 30)), max_size=60), st.integers(1, 4), st.integers(0, 8))
def test_whatever_is_reported_sizes_keep_their_limits_and_never_fall_soon_after_a_change(
    reports: list[tuple[PoolLoad, float]], low: int, extra: int
) -> None:
    scope = limits(low, low + extra, BOTH, switches=True)
    state, now, changed_at = PoolState(size=low), 0.0, -math.inf
    for load, pause in reports:
        now += pause
        after = resize({"p": state}, {"p": load}, {"p": scope}, TARGETS, now)["p"]
        assert low <= after.size <= low + extra
        if after.size < state.size:
            assert now - changed_at >= TARGETS.down_after_s
        changed_at = now if after.size != state.size else changed_at
        roles = [after.roles(index, scope) for index in range(after.size)]
        assert frozenset().union(*roles) == BOTH, "a role is with nobody"
        assert (after.prefill_places is None) == (after.size == 1)
        state = after


@settings(max_examples=25)
@given(st.floats(0, 11), st.sampled_from([PREFILL, DECODE, BOTH]))
def test_a_load_that_stands_still_is_met_and_then_nothing_moves(needed: float, roles: frozenset[Role]) -> None:
    half = needed / len(roles)
    pool = Fluid(limits(high=20, roles=roles))
    pool.prompts = lambda _: half if Role.PREFILL in roles else 0.0
    pool.streams = lambda _: half if Role.DECODE in roles else 0.0
    pool.run(400)
    assert needed <= pool.state.size <= math.ceil(needed / TARGETS.utilization / 0.7) + 1
    pool.sizes.clear()
    pool.run(400)
    assert pool.sizes == []


@given(st.integers(1, 3), st.integers(1, 12))
def test_no_traffic_goes_to_the_minimum(low: int, extra: int) -> None:
    pool = Fluid(limits(low, low + extra, BOTH))
    pool.state = PoolState(size=low + extra)
    pool.ready_at = [0.0] * pool.state.size
    pool.run(TARGETS.down_after_s + 2)
    assert pool.state.size == low
    assert len(pool.sizes) == 1


@pytest.mark.parametrize("start_s", [5.0, 60.0, 240.0])
def test_workers_on_their_way_count_as_there(start_s: float) -> None:
    """However long they take, what piles up meanwhile does not ask for more and more of them."""
    pool = Fluid(limits(high=64), lambda now: 5.0 if now > 10 else 0.1, start_s=start_s)
    pool.run(10 + start_s)
    assert pool.state.size <= math.ceil(5.0 / TARGETS.utilization) + 1
    assert all(after > before for (_, before), (_, after) in zip(pool.sizes, pool.sizes[1:], strict=False))


def test_up_is_fast_and_down_is_slow() -> None:
    pool = Fluid(limits(), lambda now: 4.0 if now < 300 else 0.0)
    pool.run(TARGETS.up_after_s + 2)
    assert pool.state.size >= 4
    pool.run(300)
    at_the_top = pool.state.size
    pool.run(50)
    assert pool.state.size == at_the_top
    pool.run(120)
    assert pool.state.size == 1


def test_a_load_that_goes_back_and_forth_faster_than_down_does_not_flap() -> None:
    pool = Fluid(limits(), lambda now: 4.0 if now % 40 < 20 else 0.5)
    pool.run(600)
    pool.sizes.clear()
    pool.run(HOUR)
    assert pool.sizes == []


def test_long_prompts_that_come_one_by_one_do_not_keep_a_pool_large() -> None:
    """Each is work for two seconds: a worker has something to do or nothing, and now and then several have. Of eight
    workers the load needs two or three."""
    random = Random(3)
    pool = Fluid(limits(high=8), lambda now: 8.0 if now < 60 else 2.0 * (random.random() < 3 / 8))
    pool.run(60)
    assert pool.state.size == 8
    pool.run(10 * TARGETS.down_after_s)
    assert pool.state.size <= 3, pool.sizes
    pool.run(HOUR)
    pool.sizes.clear()
    pool.run(HOUR)
    assert pool.state.size <= 3 and turns(pool) <= 4, pool.sizes


def test_a_pool_of_fixed_size_follows_the_mix_with_its_roles() -> None:
    """Prompts in the morning, streams in the evening: the same eight workers."""
    morning = HOUR
    pool = Fluid(
        limits(8, 8, BOTH, switches=True),
        lambda now: 4.0 if now < morning else 1.0,
        lambda now: 1.0 if now < morning else 4.0,
    )
    pool.run(morning)
    assert pool.state.prefill_places is not None
    first = pool.state.prefill_places
    assert len(first) >= 5
    pool.run(HOUR)
    assert len(pool.state.prefill_places) <= 3
    assert pool.state.prefill_places < first, "a worker changed its role for nothing"
    second = pool.state
    pool.run(HOUR)
    assert pool.state.prefill_places == second.prefill_places
    assert pool.sizes == []


def day(now: float, random: Random, peak: float) -> float:
    """Nothing at night, a hump by day with noise, a burst at noon."""
    hour = now / HOUR
    if not 6 <= hour <= 22:
        return 0.0
    hump = peak * math.sin(math.pi * (hour - 6) / 16) ** 2
    burst = peak if 12 <= hour < 12.1 else 0.0
    return max(0.0, hump * random.uniform(0.8, 1.2) + burst)


@pytest.mark.parametrize("roles", [PREFILL, DECODE], ids=["prompts", "streams"])
def test_over_a_day_it_serves_all_with_far_less_than_the_peak_and_few_changes(roles: frozenset[Role]) -> None:
    random, peak = Random(4), 6.0
    pool = Fluid(limits(1, 20, roles), step_s=2.0)
    if roles == PREFILL:
        pool.prompts = lambda now: day(now, random, peak)
    else:
        pool.streams = lambda now: day(now, random, peak)
    pool.run(24 * HOUR)
    assert pool.backlog_s == 0
    assert pool.worst_wait_s < START_S  # the burst doubles the load at once
    largest = max(size for _, size in pool.sizes)
    assert largest >= 2 * peak
    assert pool.worker_s < 0.3 * largest * 24 * HOUR
    assert pool.sizes[-1][1] == 1
    assert len(pool.sizes) < 35 and turns(pool) <= 4, pool.sizes

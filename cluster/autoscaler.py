"""How many workers a pool should have, and which of them compute prompts: a pure function of load, limits and time.

    need of prompts   (share of time computing + growth of what waits) / utilization, and enough to clear what waits
                      within `ttft_s`
    need of streams   places and blocks in use / utilization, and more while tokens come slower than `inter_token_s`

A need that stays above the size for `up_after_s` raises it to the least that was needed meanwhile. Its mean over some
time, where it stays below for `down_after_s`, with a margin, lowers it to the most that this mean was: a prompt keeps a
worker busy for seconds, so a second in which several are computed at once says little about how many workers are
needed. Nor does a pool fall back to a size that turned out too small, not long ago, under a load like this one. So no
size falls within `down_after_s` after any change, and no load that stands still moves a size back and forth, however
unevenly it comes. Workers on their way count as there: while any are, only what
must be computed in each second raises a size, not the queues and latencies that they will mend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cluster.config import Role

_MEAN_OVER = 1 / 20  # of `down_after_s`: as long as the need lasts that counts for a smaller size
_OUTGROWN_FOR = 60  # times `down_after_s`: so long is remembered under which load a size was too small
_DOWN_MARGIN = 0.7  # of the utilization: what a smaller pool may be filled to
_MAX_STRETCH = 2.0  # of a size, by a latency alone
_FIRM_SHARE = 0.75  # of a worker: a smaller difference is no reason to change a role


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """What one worker tells of the last second or so."""

    roles: frozenset[Role]
    busy: float = 0.0  # share of the time in which it computed prompts
    backlog_s: float = 0.0  # what the prompts that wait there take, at its measured speed
    queue_s: float = 0.0  # from acceptance to the first step, mean of the prompts that began
    occupancy: float = 0.0  # the larger share of places and of blocks that streams use or wait for; may exceed 1
    inter_token_s: float = 0.0  # between two tokens of a stream, mean


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLoad:
    """`workers`: those that are ready; `num_pending`: those on their way."""

    workers: tuple[WorkerLoad, ...]
    num_pending: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """`switches`: its workers take one of the two roles each, as the load asks."""

    roles: frozenset[Role]
    min_workers: int
    max_workers: int
    switches: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    ttft_s: float
    inter_token_s: float
    utilization: float
    up_after_s: float
    down_after_s: float


@dataclass(frozen=True, slots=True)
class Streak:
    """Since when another number is wanted, and the most careful one that was wanted since."""

    since: float
    number: int


@dataclass(frozen=True, slots=True)
class Outgrown:
    """A size that was too small when this was the mean need."""

    size: int
    mean_need: float
    at: float

    def forbids(self, size: int, mean_need: float) -> bool:
        return size <= self.size and mean_need > _DOWN_MARGIN * self.mean_need


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """What one step leaves to the next. `prefill_places`: whose workers compute prompts, the others decode; None: all
    of them have all roles of the pool."""

    size: int
    prefill_places: frozenset[int] | None = None
    seen_at: float | None = None
    backlog_s: float = 0.0
    mean_need: float | None = None  # workers
    raised_at: float | None = None  # where the last change of the size was up
    outgrown: tuple[Outgrown, ...] = ()
    up: Streak | None = None
    down: Streak | None = None
    shift: Streak | None = None  # of the number of `prefill_places`

    def roles(self, index: int, limits: PoolLimits) -> frozenset[Role]:
        """Of the worker in place `index`."""
        if self.prefill_places is None:
            return limits.roles
        return frozenset({Role.PREFILL if index in self.prefill_places else Role.DECODE})


@dataclass(frozen=True, slots=True)
class Need:
    """In workers, with fractions."""

    prefill: float
    decode: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode


def resize(
    states: Mapping[str, PoolState],
    loads: Mapping[str, PoolLoad],
    limits: Mapping[str, PoolLimits],
    targets: Targets,
    now: float,
) -> dict[str, PoolState]:
    """The next state of every pool in `limits`. A pool without a state begins at its least size; one of which nothing
    is known stays as it is, within its limits."""
    return {
        name: _next(states.get(name) or PoolState(size=limit.min_workers), loads.get(name), limit, targets, now)
        for name, limit in limits.items()
    }


def need(state: PoolState, load: PoolLoad, targets: Targets, now: float) -> Need:
    """What the load asks for, whatever the size is."""
    return Need(_prefill_need(load, targets, max(0.0, _growth(state, load, now))), _decode_need(load, targets))


def _next(state: PoolState, load: PoolLoad | None, limits: PoolLimits, targets: Targets, now: float) -> PoolState:
    low, high = limits.min_workers, limits.max_workers
    before = state.size
    state = replace(state, size=min(max(before, low), high))
    asked = None
    if load is not None and load.workers:
        asked = need(state, load, targets, now)
        mean_need = _mean_need(state, load, limits, targets, now)
        state = _sized(state, asked.total, mean_need, limits, targets, now)
        state = replace(
            state, mean_need=mean_need, seen_at=now, backlog_s=sum(worker.backlog_s for worker in load.workers)
        )
    if not limits.switches or state.size < 2:  # one worker alone has both roles
        return replace(state, prefill_places=None, shift=None)
    return _shared_out(state, before, asked, targets, now)


def _sized(
    state: PoolState, asked: float, mean_need: float, limits: PoolLimits, targets: Targets, now: float
) -> PoolState:
    low, high = limits.min_workers, limits.max_workers
    wanted = min(max(_whole(asked), low), high)
    outgrown = _remembered(state.outgrown, mean_need, targets, now)
    enough = min(max(_whole(mean_need / _DOWN_MARGIN), low), high)
    while enough < state.size and any(each.forbids(enough, mean_need) for each in outgrown):
        enough += 1
    up = down = None
    if wanted > state.size:
        up = Streak(now, wanted) if state.up is None else replace(state.up, number=min(state.up.number, wanted))
        if now - up.since >= targets.up_after_s:
            if state.raised_at is None or now - state.raised_at >= targets.down_after_s:  # it had its time
                outgrown = _with_outgrown(outgrown, state.size, mean_need, now)
            return replace(state, size=up.number, raised_at=now, up=None, down=None, outgrown=outgrown)
    if enough < state.size:
        down = Streak(now, enough) if state.down is None else replace(state.down, number=max(state.down.number, enough))
        if now - down.since >= targets.down_after_s:
            return replace(state, size=down.number, raised_at=None, up=None, down=None, outgrown=outgrown)
    return replace(state, up=up, down=down, outgrown=outgrown)


def _with_outgrown(outgrown: tuple[Outgrown, ...], size: int, mean_need: float, now: float) -> tuple[Outgrown, ...]:
    """The least load counts that it was too small for."""
    if all(each.size != size for each in outgrown):
        return *outgrown, Outgrown(size, mean_need, now)
    return tuple(
        replace(each, mean_need=min(each.mean_need, mean_need)) if each.size == size else each for each in outgrown
    )


def _remembered(outgrown: tuple[Outgrown, ...], mean_need: float, targets: Targets, now: float) -> tuple[Outgrown, ...]:
    """The mean follows slowly: what it comes to in the next `down_after_s` was the load."""
    return tuple(
        replace(each, mean_need=max(each.mean_need, mean_need)) if now - each.at < targets.down_after_s else each
        for each in outgrown
        if now - each.at < _OUTGROWN_FOR * targets.down_after_s
    )


def _shared_out(state: PoolState, before: int, asked: Need | None, targets: Targets, now: float) -> PoolState:
    """Who computes prompts: in proportion to the needs, at least one of each kind. New places get what is wanting; a
    worker changes its role only where one role stays short of workers for `up_after_s`."""
    size = state.size
    share = asked.prefill / asked.total if asked is not None and asked.total else 0.5
    wanted = min(max(round(size * share), 1), size - 1)
    if state.prefill_places is None:
        return replace(state, prefill_places=frozenset(range(wanted)), shift=None)
    places = {index for index in state.prefill_places if index < size}
    for index in range(before, size):
        if len(places) < wanted:
            places.add(index)
    shift = None
    if asked is not None and len(places) != wanted:
        short_of = asked.prefill > len(places) if wanted > len(places) else asked.decode > size - len(places)
        # Rounding alone would go back and forth.
        if short_of and abs(size * share - len(places)) > _FIRM_SHARE:
            same_way = state.shift is not None and (state.shift.number > len(places)) == (wanted > len(places))
            shift = state.shift if same_way and state.shift is not None else Streak(now, wanted)
            nearer = min(shift.number, wanted, key=lambda number: abs(number - len(places)))
            shift = replace(shift, number=nearer)
            if now - shift.since >= targets.up_after_s:
                _move(places, size, shift.number)
                shift = None
    _move(places, size, min(max(len(places), 1), size - 1))
    return replace(state, prefill_places=frozenset(places), shift=shift)


def _move(places: set[int], size: int, number: int) -> None:
    """As many places as `number`, changing the last ones."""
    while len(places) > number:
        places.remove(max(places))
    while len(places) < number:
        places.add(max(index for index in range(size) if index not in places))


def _mean_need(state: PoolState, load: PoolLoad, limits: PoolLimits, targets: Targets, now: float) -> float:
    """Of what comes, not of how it queues; older loads count less. What waits less than before counts against what is
    computed: no prompt counts twice."""
    busy = sum(worker.busy for worker in load.workers if Role.PREFILL in worker.roles)
    asked = (busy + _growth(state, load, now)) / targets.utilization + _decode_need(load, targets)
    asked = min(asked, float(limits.max_workers))
    if state.mean_need is None or state.seen_at is None:
        return asked
    kept = math.exp((state.seen_at - now) / (_MEAN_OVER * targets.down_after_s))
    return kept * state.mean_need + (1 - kept) * asked


def _growth(state: PoolState, load: PoolLoad, now: float) -> float:
    """Of the prompts that wait, in seconds of work per second."""
    if state.seen_at is None or now <= state.seen_at:
        return 0.0
    backlog_s = sum(worker.backlog_s for worker in load.workers if Role.PREFILL in worker.roles)
    return (backlog_s - state.backlog_s) / (now - state.seen_at)


def _prefill_need(load: PoolLoad, targets: Targets, growth: float) -> float:
    """`growth`: of what waits, in seconds of work per second."""
    workers = [worker for worker in load.workers if Role.PREFILL in worker.roles]
    if not workers:
        return 0.0
    busy = sum(worker.busy for worker in workers)
    backlog_s = sum(worker.backlog_s for worker in workers)
    steady = (busy + growth) / targets.utilization
    if load.num_pending:
        return steady
    queue_s = sum(worker.queue_s for worker in workers) / len(workers)
    late = len(workers) * min(_MAX_STRETCH, queue_s / targets.ttft_s) if queue_s > targets.ttft_s else 0.0
    return max(steady, busy + backlog_s / targets.ttft_s, late)


def _decode_need(load: PoolLoad, targets: Targets) -> float:
    workers = [worker for worker in load.workers if Role.DECODE in worker.roles]
    if not workers:
        return 0.0
    filled = sum(worker.occupancy for worker in workers) / targets.utilization
    pace_s = sum(worker.inter_token_s for worker in workers) / len(workers)
    if load.num_pending or pace_s <= targets.inter_token_s:
        return filled
    return max(filled, len(workers) * min(_MAX_STRETCH, pace_s / targets.inter_token_s))


def _whole(workers: float) -> int:
    return math.ceil(workers - 1e-9)

"""What a pool must do next, decided from plain values: nothing here talks to Ray.

A pool has one place per worker, numbered from 0. A worker carries the fingerprint of the config it was started
with; one with another fingerprint than the wanted one is stale and is replaced, one place at a time, and drained
only when its successor is ready. Where the cluster has no room for both, the stale one goes first. One whose node is
to go is replaced likewise, and waits for no other place's turn. A successor with other weights serves nobody until all
roles are there with those weights: till then the stale ones stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.config import Role
from cluster.membership import Member, MemberState


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One worker as the pool sees it. `age_s`: since its actor was asked for."""

    incarnation: str
    index: int
    fingerprint: str
    state: MemberState
    placed: bool  # the cluster has room for it
    age_s: float
    roles: tuple[Role, ...] = ()
    compatibility_hash: bytes = b""
    leaving: bool = False  # its node is to go

    @property
    def live(self) -> bool:
        return self.state in (MemberState.STARTING, MemberState.READY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the config, or the autoscaler, asks of a pool.

    `roles`: by place; none: those that the workers have. `keeps_stale`: workers of other weights than their successors.
    """

    num_workers: int
    fingerprint: str
    roles: tuple[tuple[Role, ...], ...] = ()
    keeps_stale: bool = False


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How many workers a pool has, by the roles of each place."""

    roles: tuple[tuple[Role, ...], ...]

    @property
    def num_workers(self) -> int:
        return len(self.roles)


@dataclass(frozen=True, slots=True, kw_only=True)
class Actions:
    """`start`: places that get a new worker. `drain`: incarnations that finish their requests and go. `switch`: places
    whose worker takes the roles that are wanted there."""

    start: tuple[int, ...] = ()
    drain: tuple[str, ...] = ()
    switch: tuple[int, ...] = ()


def decide(
    standing: Sequence[Standing],
    wanted: Wanted,
    now: float,
    not_before: Mapping[int, float],
    surge_wait_s: float,
) -> Actions:
    """`not_before`: per place, the earliest time of the next start (backoff). Oldest workers first in `standing`.

    `surge_wait_s`: a successor that found no room for this long takes the place of its predecessor.
    """
    live = [worker for worker in standing if worker.live]
    lasting = [worker for worker in live if worker.fingerprint == wanted.fingerprint and not worker.leaving]
    rolling = any(worker.state is MemberState.STARTING for worker in lasting)
    start: list[int] = []
    switch: list[int] = []
    drain = [worker.incarnation for worker in live if worker.index >= wanted.num_workers]
    for index in range(wanted.num_workers):
        here = [worker for worker in live if worker.index == index]
        fresh = [worker for worker in here if worker in lasting]
        stale = [worker for worker in here if worker not in lasting]
        # A stale worker that is not ready serves nobody.
        drain += [worker.incarnation for worker in stale if worker.state is MemberState.STARTING]
        serving = [worker for worker in stale if worker.state is MemberState.READY]
        if not fresh:
            waits = serving and rolling and not any(worker.leaving for worker in serving)
            if now >= not_before.get(index, 0.0) and not waits:
                start.append(index)
                rolling = True
            continue
        kept = next((worker for worker in fresh if worker.state is MemberState.READY), fresh[0])
        drain += [worker.incarnation for worker in fresh if worker is not kept]
        if kept.state is MemberState.READY:
            same = [each for each in serving if each.compatibility_hash == kept.compatibility_hash]
            drain += [each.incarnation for each in (same if wanted.keeps_stale else serving)]
        elif not kept.placed and kept.age_s >= surge_wait_s:
            drain += [each.incarnation for each in serving]
        if wanted.roles and kept.roles != wanted.roles[index]:
            switch.append(index)
    return Actions(start=tuple(start), drain=tuple(drain), switch=tuple(switch))


def serves(fresh: Iterable[Member], roles: Collection[Role]) -> bool:
    """Whether all `roles` are with ready workers of one compatibility hash."""
    covered: dict[bytes, set[Role]] = {}
    for member in fresh:
        if member.state is MemberState.READY:
            covered.setdefault(member.compatibility_hash, set()).update(member.roles)
    return any(there.issuperset(roles) for there in covered.values())


def backoff_s(num_failures: int, first_s: float = 0.2, max_s: float = 30.0) -> float:
    """Pause before the start that follows the `num_failures`-th failure in a row; the first one costs nothing."""
    return 0.0 if num_failures <= 1 else min(max_s, first_s * 2 ** min(num_failures - 2, 20))

"""A Ray cluster for tests, and waiting for what happens in it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import ray
from ray.util import list_named_actors, placement_group_table

from cluster.membership import Member, Membership, MemberState
from deploy.local_cluster import LocalCluster

DEADLINE_S = 30.0


@contextmanager
def ray_cluster(num_cpus: int = 8) -> Iterator[LocalCluster]:
    cluster = LocalCluster.start(num_cpus, "SLUICE_TEST_SECRET")
    try:
        yield cluster
    finally:
        cluster.stop()


def answer(call: Any, timeout_s: float = DEADLINE_S) -> Any:
    """What an actor answers to `call`, e.g. answer(actor.describe.remote())."""
    return ray.get(call, timeout=timeout_s)


async def until(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Waits in the event loop; fails naming `what`."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s:g} s: {what}"
        await asyncio.sleep(0.01)


def follow(controller: Any, done: Callable[[Membership], bool], deadline_s: float = DEADLINE_S) -> list[Membership]:
    """Every membership that the controller publishes, up to the first for which `done` holds.

    Polls as a stranger, so that no drain waits for it.
    """
    seen: list[Membership] = [Membership(version=-1)]
    end = time.monotonic() + deadline_s
    while not done(seen[-1]):
        left_s = end - time.monotonic()
        assert left_s > 0, f"not within {deadline_s:g} s; last seen {seen[-1]}"
        call = controller.watch.remote("a test", seen[-1].version, min(left_s, 2.0))
        membership = Membership.from_wire(answer(call, left_s + 5))
        if membership.version != seen[-1].version:
            seen.append(membership)
    return seen[1:]


def in_state(membership: Membership, state: MemberState) -> list[Member]:
    return [member for member in membership.members if member.state is state]


def all_ready(num_workers: int) -> Callable[[Membership], bool]:
    """Exactly so many workers, all READY."""
    return lambda membership: [m.state for m in membership.members] == [MemberState.READY] * num_workers


def names_left(app: str) -> list[str]:
    """Actors and placement groups of an app that exist in the cluster."""
    actors: Any = list_named_actors(all_namespaces=True)
    groups = [entry["name"] for entry in placement_group_table().values() if entry["state"] != "REMOVED"]
    return [name for name in [*(actor["name"] for actor in actors), *groups] if name.startswith(f"{app}:")]


def runs(pid: int) -> bool:
    """Whatever it does meanwhile."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import ray

from cluster.actor_calls import NAMESPACE
from cluster.config import LogConfig, SluiceConfig
from cluster.log import Log
from cluster.membership import Member, Membership, MemberState
from cluster.pool import ActorPool
from cluster.worker_spec import ActorName, fingerprint
from deploy.local_cluster import LocalCluster
from tests.support.idle_actor import IdleActor, idle_config
from tests.support.ray_cluster import names_left, runs, until

pytestmark = pytest.mark.cluster


class Watched:
    """A pool with a record of what it published."""

    def __init__(self, app: str) -> None:
        self.app = app
        self.history: list[tuple[Member, ...]] = []
        self.num_noticed = 0
        self.pool = ActorPool(
            app, "decode", IdleActor, self._changed, self._noticed, Log.open("test", LogConfig(level="error"))
        )

    def _changed(self) -> None:
        self.history.append(self.pool.members())

    async def _noticed(self) -> None:
        assert any(member.state is MemberState.DRAINING for member in self.history[-1])
        self.num_noticed += 1

    def config(self, workers: int, path: str = "/idle", **words: float) -> SluiceConfig:
        config = idle_config(self.app, path, decode=workers, prefill=1)
        return config.model_copy(update={"words": config.words.model_copy(update=words)})

    async def ready(self, num_workers: int) -> tuple[Member, ...]:
        states = [MemberState.READY] * num_workers
        await until(lambda: [m.state for m in self.pool.members()] == states, f"{num_workers} ready workers")
        return tuple(sorted(self.pool.members(), key=lambda member: member.name))


@asynccontextmanager
async def watched(app: str) -> AsyncIterator[Watched]:
    """The pool is drained in the end, and nothing of it is left."""
    pool = Watched(app)
    yield pool
    await pool.pool.drain()
    assert names_left(app) == []


def actor_of(app: str, member: Member) -> Any:
    index = int(member.name.rpartition("-")[2])
    return ray.get_actor(str(ActorName(app, member.pool, index, member.incarnation[:8])), NAMESPACE)


def test_a_killed_worker_is_replaced_under_its_name_by_another_incarnation(local_cluster: LocalCluster) -> None:
    async def scenario() -> None:
        async with watched("kill") as w:
            w.pool.start(w.config(2))
            first, second = await w.ready(2)
            assert [first.name, second.name] == ["decode-0", "decode-1"]
            os.kill(first.pid, signal.SIGKILL)
            await until(lambda: w.pool.members() != () and first not in w.pool.members(), "the death is seen")
            again, same = await w.ready(2)
            assert (again.name, same) == (first.name, second)
            assert again.incarnation != first.incarnation
            assert again.pid != first.pid
            assert w.pool.failures() == ()

    asyncio.run(scenario())


def test_hung_and_frozen_workers_are_replaced(local_cluster: LocalCluster) -> None:
    async def scenario() -> None:
        async with watched("hang") as w:
            w.pool.start(w.config(2, step_timeout_s=0.5))
            hung, frozen = await w.ready(2)
            await actor_of("hang", hung).sicken.remote()
            os.kill(frozen.pid, signal.SIGSTOP)
            await until(lambda: not {hung, frozen} & set(w.pool.members()), "both are given up")
            fresh = await w.ready(2)
            assert not {m.incarnation for m in fresh} & {hung.incarnation, frozen.incarnation}
            await until(lambda: not runs(hung.pid) and not runs(frozen.pid), "their processes are gone")

    asyncio.run(scenario())


def test_shrinking_publishes_first_and_lets_open_requests_end(local_cluster: LocalCluster) -> None:
    async def scenario() -> None:
        async with watched("shrink") as w:
            w.pool.start(w.config(2, "/busy"))
            kept, leaving = await w.ready(2)
            w.pool.start(w.config(1, "/busy"))
            draining = [kept.state, MemberState.DRAINING]
            await until(lambda: [m.state for m in w.pool.members()] == draining, "decode-1 drains")
            actor = actor_of("shrink", leaving)
            await until(lambda: w.num_noticed == 1, "routers were told")
            assert runs(leaving.pid)  # its requests are open
            await actor.finish.remote()
            assert await w.ready(1) == (kept,)
            await until(lambda: not runs(leaving.pid), "its process ends")
            assert [name for name in names_left("shrink") if ":1:" in name] == []
            await actor_of("shrink", kept).finish.remote()

    asyncio.run(scenario())


def test_a_worker_whose_node_is_to_go_goes_when_its_successor_is_ready(local_cluster: LocalCluster) -> None:
    async def scenario() -> None:
        async with watched("leave") as w:
            w.pool.start(w.config(1))
            (first,) = await w.ready(1)
            w.history.clear()
            w.pool.leave({str(ActorName("leave", "decode", 0, first.incarnation[:8])), "leave:decode:7:another"})
            await until(lambda: first.incarnation not in {m.incarnation for m in w.pool.members()}, "it is gone")
            (second,) = await w.ready(1)
            assert second.name == first.name and w.num_noticed == 1
            assert all(any(m.state is MemberState.READY for m in members) for members in w.history)

    asyncio.run(scenario())


def test_another_config_replaces_workers_one_by_one_and_none_before_its_successor(
    local_cluster: LocalCluster,
) -> None:
    async def scenario() -> None:
        async with watched("roll") as w:
            w.pool.start(w.config(2))
            old = {member.incarnation for member in await w.ready(2)}
            other = w.config(2, heartbeat_s=0.2)
            assert fingerprint(other, "decode") != fingerprint(w.config(2), "decode")
            w.history.clear()
            w.pool.start(other)
            await until(lambda: not old & {m.incarnation for m in w.pool.members()}, "all are replaced")
            await w.ready(2)
            num_ready = [sum(m.state is MemberState.READY for m in members) for members in w.history]
            assert min(num_ready) == 2

    asyncio.run(scenario())


def test_a_worker_that_cannot_start_is_tried_again_with_pauses_and_says_why(local_cluster: LocalCluster) -> None:
    async def scenario() -> None:
        async with watched("refuse") as w:
            w.pool.start(w.config(1, "/refuse"))
            await until(lambda: any(failure.count >= 2 for failure in w.pool.failures()), "two failures")
            (failure,) = w.pool.failures()
            assert failure.worker == "decode-0"
            assert not failure.lasting  # no error of ours
            assert failure.error == "ValueError: /refuse is no checkpoint; name another directory"
            w.pool.start(w.config(1))  # the remedy works at once, whatever the pause
            await w.ready(1)

    asyncio.run(scenario())


def test_workers_are_told_who_is_alive_and_keep_the_latest(local_cluster: LocalCluster) -> None:
    async def scenario() -> None:
        async with watched("tell") as w:
            w.pool.start(w.config(1))
            (member,) = await w.ready(1)
            actor = actor_of("tell", member)
            for version in (7, 6):
                w.pool.push(Membership(version, (member,)).to_wire())
            told = Membership()
            while told.version < 7:
                told = Membership.from_wire(await actor.members.remote())
            assert told == Membership(7, (member,))

    asyncio.run(scenario())

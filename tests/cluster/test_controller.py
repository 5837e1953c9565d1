from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
import ray
from ray.exceptions import RayError

from cluster.config import LogConfig
from cluster.controller import Renewal, Status, connect
from cluster.exporter import Export
from cluster.log import Log
from cluster.membership import Membership, MemberState
from deploy.lifeline import Lifeline
from deploy.local_cluster import LocalCluster
from tests.support.idle_actor import IdleActor, idle_config
from tests.support.ray_cluster import all_ready, answer, follow, in_state, names_left, runs, until
from tests.support.scrape import scrape

pytestmark = pytest.mark.cluster


def test_the_highest_revision_is_in_force_and_a_resize_keeps_the_others(local_cluster: LocalCluster) -> None:
    controller = connect("resize", IdleActor)
    small, large = (idle_config("resize", decode=n, prefill=1).model_dump_json() for n in (1, 2))
    assert answer(controller.configure.remote(small, 5))
    before = follow(controller, all_ready(2))[-1]
    assert answer(controller.configure.remote(large, 6))
    grown = follow(controller, all_ready(3))[-1]
    assert set(before.members) < set(grown.members)
    assert not answer(controller.configure.remote(small, 5))
    assert not answer(controller.configure.remote(small, 6))
    assert answer(controller.configure.remote(small, 7))
    published = follow(controller, lambda m: len(m.members) == 2)
    assert set(published[-1].members) == set(before.members)
    assert [m.version for m in published] == sorted({m.version for m in published})
    answer(controller.remove.remote())


def test_a_pool_that_the_config_no_longer_names_is_drained(local_cluster: LocalCluster) -> None:
    controller = connect("rename", IdleActor)
    answer(controller.configure.remote(idle_config("rename", decode=1, prefill=1).model_dump_json(), 1))
    follow(controller, all_ready(2))
    other = idle_config("rename", decode=1, prefill=0, encode=1)
    other = other.model_copy(update={"pools": {k: v for k, v in other.pools.items() if k != "prefill"}})
    answer(controller.configure.remote(other.model_dump_json(), 2))
    follow(controller, lambda m: {x.pool for x in in_state(m, MemberState.READY)} == {"decode", "encode"})
    answer(controller.remove.remote())


def test_a_restarted_controller_adopts_its_workers_and_the_ingress_follows(local_cluster: LocalCluster) -> None:
    async def scenario() -> None:
        seen: list[Membership] = []
        config = idle_config("adopt", decode=2, prefill=1)
        log = Log.open("test", LogConfig(level="error"))
        export = Export(name="ingress-1", incarnation="x", address="127.0.0.1:3", roles=("ingress",))
        lifeline = Lifeline(
            config, 9, "ingress-1", IdleActor, lambda membership, _: seen.append(membership), log, export
        )
        lifeline.start()
        await until(lambda: bool(seen) and all_ready(3)(seen[-1]), "the ingress sees three ready workers")
        before = seen[-1]
        assert all(member.metrics_address == "127.0.0.1:2" for member in before.members)
        await until(lambda: len(lifeline.exports) == 2, "the controller exports its metrics, too")
        its_own, ours = lifeline.exports
        assert ours == export and its_own.name == "controller"
        assert scrape(its_own.address).total("sluice_cluster_workers", state="ready") == 3
        controller = connect("adopt", IdleActor)
        first: Status = await controller.status.remote()
        assert (first.revision, first.num_ingresses) == (9, 1)
        killed = before.members[0]

        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: seen[-1].version != before.version, "the new controller answers the ingress", 10)
        assert seen[-1].version > before.version
        assert seen[-1].members == before.members
        second: Status = await controller.status.remote()
        while second.revision != 9:  # the config comes with a renewal
            assert second.revision == -1
            second = await controller.status.remote()
        assert second.pid != first.pid
        successor: list[Export] = []

        def exported() -> bool:
            successor[:] = [e for e in lifeline.exports if e.name == "controller" and e != its_own]
            return len(successor) == 1 and export in lifeline.exports

        await until(exported, "the new controller exports its metrics, and names those of the ingress")
        assert scrape(successor[0].address).total("sluice_cluster_workers", state="ready") == 3

        os.kill(killed.pid, signal.SIGKILL)  # adopted workers are watched like any other
        await until(lambda: killed not in seen[-1].members, "the death is published")
        await until(lambda: all_ready(3)(seen[-1]), "a successor is published")
        assert scrape(successor[0].address).total("sluice_cluster_restarts_total", pool=killed.pool) == 1
        await lifeline.stop()
        await controller.remove.remote()
        await until(lambda: names_left("adopt") == [], "nothing is left")

    asyncio.run(scenario())


def test_a_draining_worker_stays_draining_under_the_next_controller(local_cluster: LocalCluster) -> None:
    controller = connect("drain", IdleActor)
    two, one = (idle_config("drain", "/busy", decode=n) for n in (2, 1))
    answer(controller.configure.remote(two.model_dump_json(), 1))
    follow(controller, all_ready(2))
    answer(controller.configure.remote(one.model_dump_json(), 2))
    draining = in_state(follow(controller, lambda m: bool(in_state(m, MemberState.DRAINING)))[-1], MemberState.DRAINING)
    (name,) = {name for name in names_left("drain") if ":1:" in name}
    actor = ray.get_actor(name, "sluice")
    deadline = time.monotonic() + 10
    while b'"draining"' not in answer(actor.describe.remote()).member:  # it has heard of it
        assert time.monotonic() < deadline
    os.kill(answer(controller.status.remote()).pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while True:
        try:
            adopted = Membership.from_wire(answer(controller.status.remote(), 5).membership)
            break
        except RayError:
            assert time.monotonic() < deadline
    assert in_state(adopted, MemberState.DRAINING) == draining
    assert runs(draining[0].pid)
    answer(actor.finish.remote())
    follow(controller, all_ready(1))
    for name in names_left("drain"):
        if ":decode:" in name:
            answer(ray.get_actor(name, "sluice").finish.remote())
            break
    answer(controller.remove.remote())


def test_without_an_ingress_everything_goes(local_cluster: LocalCluster) -> None:
    controller = connect("lease", IdleActor)
    config = idle_config("lease", decode=1, prefill=1)
    hasty = config.model_copy(update={"controller": config.controller.model_copy(update={"ingress_lease_s": 2.0})})
    renewal: Renewal = answer(controller.renew.remote("ingress-1", 1, config.model_dump_json()))
    assert (renewal.num_ingresses, renewal.removing) == (1, False)
    members = follow(controller, all_ready(2))[-1].members
    pids = [member.pid for member in members] + [answer(controller.status.remote()).pid]
    answer(controller.renew.remote("ingress-1", 2, hasty.model_dump_json()))
    assert answer(controller.status.remote()).revision == 2
    assert all(runs(pid) for pid in pids)
    asyncio.run(until(lambda: not any(runs(pid) for pid in pids), "all processes of the app end"))
    asyncio.run(until(lambda: names_left("lease") == [], "no actor and no placement group is left"))

"""A controller that changes what stands: sizes by load, roles without a restart, weights side by side."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import RayError

from cluster.actor_calls import NAMESPACE
from cluster.autoscaler import WorkerLoad
from cluster.config import Role, SluiceConfig
from cluster.config_file import parse
from cluster.controller import connect
from cluster.membership import Member, Membership, MemberState
from cluster.worker_spec import ActorName
from deploy.local_cluster import LocalCluster
from tests.support.idle_actor import IdleActor, idle_config
from tests.support.ray_cluster import all_ready, answer, follow, in_state

pytestmark = pytest.mark.cluster


def scaled(name: str, **pool: object) -> SluiceConfig:
    return parse(
        {
            "name": name,
            "model": {"path": "/idle"},
            "pools": {"mixed": {"cpus": 0.01, "roles": ["prefill", "decode"], "max_workers": 3, **pool}},
            "controller": {"drain_timeout_s": 20, "start_timeout_s": 30, "check_s": 0.1},
            "autoscaling": {"enabled": True, "up_after_s": 0.5, "down_after_s": 1, "switch_roles": True},
        }
    )


def actor_of(app: str, member: Member) -> Any:
    name = ActorName(app, member.pool, int(member.name.rpartition("-")[2]), member.incarnation[:8])
    return ray.get_actor(str(name), NAMESPACE)


def load(app: str, members: Membership, **per_role: WorkerLoad) -> None:
    for member in in_state(members, MemberState.READY):
        both = [per_role[role] for role in member.roles]
        told = WorkerLoad(
            roles=frozenset(member.roles),
            busy=max(each.busy for each in both),
            backlog_s=max(each.backlog_s for each in both),
            occupancy=max(each.occupancy for each in both),
        )
        answer(actor_of(app, member).set_load.remote(told))


def with_roles(*wanted: tuple[Role, ...]) -> Callable[[Membership], bool]:
    """All ready, and so many workers of these roles."""
    return lambda members: (
        all(member.state is MemberState.READY for member in members.members)
        and sorted(tuple(sorted(member.roles)) for member in members.members) == sorted(wanted)
    )


IDLE, BUSY, FULL, LATE = (
    WorkerLoad(roles=frozenset(), **each)
    for each in ({}, {"busy": 1.0}, {"occupancy": 1.2}, {"busy": 1.0, "backlog_s": 2.0})
)
PREFILL, DECODE, BOTH = (Role.PREFILL,), (Role.DECODE,), (Role.DECODE, Role.PREFILL)


def test_a_pool_follows_its_load_in_size_and_roles_also_under_the_next_controller(
    local_cluster: LocalCluster,
) -> None:
    controller = connect("scale", IdleActor)
    answer(controller.configure.remote(scaled("scale").model_dump_json(), 1))
    one = follow(controller, with_roles(BOTH))[-1]
    load(
        "scale",
        one,
        prefill=WorkerLoad(roles=frozenset(), busy=1.0),
        decode=WorkerLoad(roles=frozenset(), occupancy=1.2),
    )
    three = follow(controller, with_roles(PREFILL, DECODE, DECODE))[-1]
    assert one.members[0].incarnation in {member.incarnation for member in three.members}

    # As many, but prompts instead of streams: somebody changes its role and is not restarted.
    load(
        "scale",
        three,
        prefill=WorkerLoad(roles=frozenset(), busy=1.0),
        decode=WorkerLoad(roles=frozenset(), occupancy=0.2),
    )
    for member in three.members:
        if member.roles == PREFILL:
            busy = WorkerLoad(roles=frozenset(PREFILL), busy=1.0, backlog_s=2.0)
            answer(actor_of("scale", member).set_load.remote(busy))
    switched = follow(controller, with_roles(PREFILL, PREFILL, DECODE))[-1]
    assert {m.incarnation for m in switched.members} == {m.incarnation for m in three.members}
    for member in switched.members:
        told = Membership()
        while (me := told.find(member.incarnation)) is None or me.roles != member.roles:
            told = Membership.from_wire(answer(actor_of("scale", member).members.remote()))

    pid = answer(controller.status.remote()).pid
    os.kill(pid, signal.SIGKILL)
    while True:
        try:
            if answer(controller.configure.remote(scaled("scale").model_dump_json(), 2)):
                break
        except RayError:
            continue
    adopted = follow(controller, all_ready(3))[-1]
    assert {m.incarnation for m in adopted.members} == {m.incarnation for m in three.members}

    load("scale", adopted, prefill=IDLE, decode=IDLE)
    last = follow(controller, with_roles(BOTH))[-1]
    assert last.members[0].incarnation in {m.incarnation for m in three.members}
    answer(controller.remove.remote())


def test_new_weights_serve_before_the_old_ones_drain(local_cluster: LocalCluster) -> None:
    """The new prefill worker alone serves nobody: the old pair stays until its decode worker is there, too."""
    controller = connect("weights", IdleActor)
    answer(controller.configure.remote(idle_config("weights", prefill=1, decode=1).model_dump_json(), 1))
    old = follow(controller, all_ready(2))[-1]
    answer(controller.configure.remote(idle_config("weights", "/later", prefill=1, decode=1).model_dump_json(), 2))
    half = follow(controller, lambda m: any(x.compatibility_hash == b"/later" for x in in_state(m, MemberState.READY)))
    waiting = [m for m in half[-1].members if m.state is MemberState.STARTING]
    while not waiting:
        half = follow(controller, lambda m: bool(in_state(m, MemberState.STARTING)))
        waiting = in_state(half[-1], MemberState.STARTING)
    assert [m.pool for m in waiting] == ["decode"]
    answer(actor_of("weights", waiting[0]).describe.remote())  # its process runs: there was room for both
    steps = follow(controller, lambda m: m.version >= half[-1].version)
    assert set(old.members) <= set(steps[-1].members), "an old worker drains though the new weights cannot serve"
    answer(actor_of("weights", waiting[0]).finish.remote())
    history = follow(controller, lambda m: len(m.members) == 2 and all_ready(2)(m))
    assert {m.compatibility_hash for m in history[-1].members} == {b"/later"}
    for members in history:
        ready = in_state(members, MemberState.READY)
        hashes = [{m.compatibility_hash for m in ready if role in m.roles} for role in (Role.PREFILL, Role.DECODE)]
        assert hashes[0] & hashes[1], f"no pair of one kind of weights: {members}"
    answer(controller.remove.remote())

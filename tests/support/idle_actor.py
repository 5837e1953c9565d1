"""A worker actor without an engine: it has a life, an address and a memory of what it was told. For pool tests."""

from __future__ import annotations

import asyncio
import os

from cluster.autoscaler import WorkerLoad
from cluster.config import SluiceConfig
from cluster.config_file import parse
from cluster.membership import Member, Membership, MemberState
from cluster.worker_spec import Description, WorkerSpec


class IdleActor:
    """Speaks the actor's side of cluster.pool; the checkpoint path of its config says how it behaves:

    /refuse   start() raises, with a reason
    /busy     a drain takes until `finish` is called
    /later    in the pool decode, start() takes until `finish` is called

    Its weights are the path.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._config = SluiceConfig.model_validate_json(spec.config)
        self._state = MemberState.STARTING
        self._members = Membership()
        self._roles = self._config.pools[spec.pool].roles
        self._finish = asyncio.Event()
        self._healthy = True
        self._load = WorkerLoad(roles=frozenset())

    def _wire(self) -> bytes:
        started = self._state is not MemberState.STARTING
        member = Member(
            name=self._spec.name,
            pool=self._spec.pool,
            incarnation=self._spec.incarnation,
            address="127.0.0.1:1" if started else "",
            metrics_address="127.0.0.1:2" if started else "",
            roles=self._roles,
            compatibility_hash=self._config.model.path.encode() if started else b"",
            pid=os.getpid(),
            state=self._state,
        )
        return Membership(members=(member,)).to_wire()

    async def describe(self) -> Description:
        return Description(member=self._wire(), fingerprint=self._spec.fingerprint)

    async def start(self) -> bytes:
        if self._config.model.path == "/refuse":
            raise ValueError("/refuse is no checkpoint; name another directory")
        if self._config.model.path == "/later" and self._spec.pool == "decode":
            await self._finish.wait()
        if self._state is MemberState.STARTING:
            self._state = MemberState.READY
        return self._wire()

    async def alive(self) -> None:
        await asyncio.Event().wait()

    async def healthy(self) -> bool:
        return self._healthy

    async def update_members(self, wire: bytes) -> None:
        self._members = max(self._members, Membership.from_wire(wire), key=lambda members: members.version)
        me = self._members.find(self._spec.incarnation)
        self._roles = me.roles if me else self._roles

    async def load(self) -> WorkerLoad:
        return self._load

    async def drain(self, timeout_s: float) -> None:
        self._state = MemberState.DRAINING
        if self._config.model.path == "/busy":
            await asyncio.wait_for(self._finish.wait(), timeout_s)

    async def stop(self) -> None:
        pass

    # ------------------------------------------------------------ for tests

    async def finish(self) -> None:
        self._finish.set()

    async def set_load(self, load: WorkerLoad) -> None:
        self._load = load

    async def sicken(self) -> None:
        self._healthy = False

    async def members(self) -> bytes:
        return self._members.to_wire()


def idle_config(name: str, path: str = "/idle", **pools: int) -> SluiceConfig:
    """Pools that ask for next to nothing, e.g. idle_config("a", prefill=1, decode=2)."""
    return parse(
        {
            "name": name,
            "model": {"path": path},
            "pools": {pool: {"workers": workers, "cpus": 0.01} for pool, workers in pools.items()},
            "router": {"local_prefill": "always"},  # any set of pools is fit
            "controller": {"ingress_lease_s": 60, "drain_timeout_s": 20, "start_timeout_s": 30, "check_s": 0.1},
        }
    )

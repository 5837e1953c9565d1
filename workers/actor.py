"""A worker as a Ray actor: life only. Requests, tokens and KV never pass here.

The methods are what `cluster.pool` calls. The actor's event loop only waits; loading and draining run in threads,
so that `describe` and `healthy` are answered at any time.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.autoscaler import WorkerLoad
from cluster.config import SluiceConfig
from cluster.errors import ConfigError
from cluster.membership import Member, Membership, MemberState
from cluster.worker_spec import Description, WorkerSpec

if TYPE_CHECKING:  # the controller and the ingress name this class, and need no torch for it
    from workers.worker import Worker


class WorkerActor:
    """Owns one Worker. A crash of its engine loop ends the process, which is how the controller learns of it."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._config = SluiceConfig.model_validate_json(spec.config)
        self._member = Member(
            name=spec.name,
            pool=spec.pool,
            incarnation=spec.incarnation,
            address="",
            roles=self._config.pools[spec.pool].roles,
            pid=os.getpid(),
        )
        self._worker: Worker | None = None
        self._starting: asyncio.Task[None] | None = None
        self._members_version = -1

    async def describe(self) -> Description:
        return Description(member=self._wire(), fingerprint=self._spec.fingerprint)

    async def start(self) -> bytes:
        """Loads the model and listens. Raises ConfigError, CheckpointError."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)
        return self._wire()

    async def alive(self) -> None:
        await asyncio.Event().wait()

    async def healthy(self) -> bool:
        return self._worker is None or self._member.state is not MemberState.READY or self._worker.healthy()

    async def update_members(self, wire: bytes) -> None:
        membership = Membership.from_wire(wire)
        if self._worker is not None and membership.version > self._members_version:
            self._members_version = membership.version
            me = membership.find(self._spec.incarnation)
            if me is not None:  # a restarted controller learns the roles from here
                self._member = replace(self._member, roles=me.roles)
            self._worker.update_members(membership)

    async def load(self) -> WorkerLoad | None:
        """None: it is not ready."""
        worker = self._worker
        return None if worker is None else await asyncio.to_thread(worker.load)

    async def drain(self, timeout_s: float) -> None:
        self._member = replace(self._member, state=MemberState.DRAINING)
        if self._worker is not None:
            await asyncio.to_thread(self._worker.drain, timeout_s)

    async def stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await asyncio.to_thread(worker.stop)

    async def _start(self) -> None:
        worker = await asyncio.to_thread(self._make)
        started = await asyncio.to_thread(worker.start)
        self._worker = worker
        self._member = replace(started, state=MemberState.READY)

    def _make(self) -> Worker:
        from workers.standalone import make_worker

        secret_env = self._config.words.secret_env
        secret = os.environ.get(secret_env, "")
        if not secret:
            raise ConfigError(
                "words.secret_env",
                f"environment variable {secret_env} is empty on this node; give every Ray node the same secret in it",
            )
        spec = self._spec
        return make_worker(self._config.in_ray(spec.pool), spec.pool, spec.name, secret.encode(), spec.incarnation)

    def _wire(self) -> bytes:
        return Membership(members=(self._member,)).to_wire()

"""The controller: one named, detached actor per app that owns the pools and answers who is where.

    name       `<app>:controller`, namespace "sluice"; Ray restarts it for ever
    configure  brings the pools to a config; the highest revision wins
    renew      an ingress lives and this is its config; none for `controller.ingress_lease_s`: everything goes
    watch      long poll of the membership
    remove     drain everything, then the controller itself

A restarted controller knows nothing but finds its workers by name; the first renew brings the config again.
Workers and streams do not notice. All methods run in the actor's event loop.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors, placement_group_table

from cluster.actor_calls import NAMESPACE, LeavingNodes, reason_of, remove_worker
from cluster.census import Census
from cluster.config import ControllerConfig, LogConfig, SluiceConfig
from cluster.errors import ConfigError
from cluster.exporter import Export, Exporter
from cluster.log import Log
from cluster.membership import Member, Membership, MemberState
from cluster.metrics import Metrics
from cluster.pool import ActorPool
from cluster.reconcile import serves
from cluster.scaler import Scaler
from cluster.words_config import WordsConfig
from cluster.worker_spec import ActorName, Failure

_SILENT_S = 10.0  # an ingress that has not renewed for so long is not waited for and takes no share of limits
_SCALE_S = 1.0
_NODES_S = 1.0
_NOTICE_S = 2.0  # longest wait for ingresses to hear of a draining worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """Answer to an ingress. `removing`: this controller is going; ask for another in a moment.

    `exports`: of the living ingresses and of the controller; those of workers travel with the membership.
    """

    num_ingresses: int
    removing: bool
    exports: tuple[Export, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """For people and tests. `membership` is wire."""

    revision: int
    membership: bytes
    num_ingresses: int
    failures: tuple[Failure, ...]
    removing: bool
    pid: int


@dataclass(slots=True)
class _Ingress:
    renewed_at: float
    seen_version: int = -1
    export: Export | None = None


def controller_name(app: str) -> str:
    return f"{app}:controller"


def connect(app: str, actor_class: type) -> Any:
    """The handle of the app's controller, which is created if there is none. Blocks for some milliseconds.

    `actor_class` is what the pools are made of; see cluster.pool.
    """
    return (
        ray.remote(Controller)
        .options(
            name=controller_name(app),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
            max_concurrency=1000,  # every ingress has a watch pending
        )
        .remote(app, actor_class)
    )


class Controller:
    async def __init__(self, app: str, actor_class: type) -> None:
        self._app = app
        self._actor_class = actor_class
        self._log = Log.open("controller", LogConfig())
        self._config: SluiceConfig | None = None
        self._revision = -1
        self._pools: dict[str, ActorPool] = {}
        self._ingresses: dict[str, _Ingress] = {}
        # Above all that a former controller has published, unless that one changed every millisecond.
        self._membership = Membership(version=int(time.time() * 1000))
        self._published = asyncio.Condition()
        self._dirty = asyncio.Event()
        self._removal: asyncio.Task[None] | None = None
        self._last_renewal = time.monotonic()
        self._metrics = Metrics()
        self._census = Census(self._metrics)
        self._scaler = Scaler(self._metrics)
        self._exporter: Exporter | None = None
        self._export: Export | None = None
        await self._adopt()
        loops = (self._publish(), self._guard_lease(), self._scale(), self._watch_nodes())
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    # ------------------------------------------------------------ what others call

    async def configure(self, config: str, revision: int) -> bool:
        """Brings the pools to `config` (JSON); returns at once. False: the same or a newer one is in force."""
        if revision <= self._revision or self._removal is not None:
            return False
        parsed = SluiceConfig.model_validate_json(config)
        self._log = Log.open("controller", parsed.log)
        moved = self._config is None or self._config.words != parsed.words
        self._config, self._revision = parsed, revision
        self._log.info("configured", version=revision, num_workers=sum(p.workers for p in parsed.pools.values()))
        standing = {
            name: sum(member.state is not MemberState.DRAINING for member in pool.members())
            for name, pool in self._pools.items()
        }
        self._scaler.configure(parsed, standing)
        sizes = self._scaler.sizes()
        for name in {**parsed.pools, **self._pools}:
            self._pool(name).start(parsed, sizes.get(name))
        self._dirty.set()
        if moved:
            await self._open_exporter(parsed.words)
        return True

    async def renew(self, ingress_id: str, revision: int, config: str, export: Export | None = None) -> Renewal:
        """The lease of an ingress. Its config counts if its revision is the highest seen; `export`: its metrics."""
        if self._removal is None:
            await self.configure(config, revision)
            self._last_renewal = time.monotonic()
            ingress = self._ingresses.setdefault(ingress_id, _Ingress(0.0))
            ingress.renewed_at, ingress.export = self._last_renewal, export
        live = self._live_ingresses()
        exports = (self._export, *(ingress.export for ingress in live))
        return Renewal(
            num_ingresses=len(live),
            removing=self._removal is not None,
            exports=tuple(export for export in exports if export is not None),
        )

    async def leave(self, ingress_id: str) -> None:
        """The ingress stops. Its lease runs on: its successor may be on its way."""
        self._ingresses.pop(ingress_id, None)

    async def watch(self, ingress_id: str, version: int, timeout_s: float) -> bytes:
        """The membership (wire), as soon as it differs from `version`, or unchanged after `timeout_s`.

        Asking with a version says that the ingress acts by it.
        """
        if ingress_id in self._ingresses:
            self._ingresses[ingress_id].seen_version = version
        async with self._published:
            self._published.notify_all()
            if version > self._membership.version:  # our clock is behind our predecessor's
                self._membership = Membership(version + 1, self._membership.members)
            try:
                async with asyncio.timeout(timeout_s):
                    await self._published.wait_for(lambda: self._membership.version != version)
            except TimeoutError:
                pass
            return self._membership.to_wire()

    async def status(self) -> Status:
        return Status(
            revision=self._revision,
            membership=self._current().to_wire(),
            num_ingresses=len(self._live_ingresses()),
            failures=tuple(failure for pool in self._pools.values() for failure in pool.failures()),
            removing=self._removal is not None,
            pid=os.getpid(),
        )

    async def remove(self) -> None:
        """Drains and removes all workers, then this actor. Returns when the workers are gone."""
        if self._removal is None:
            self._removal = asyncio.create_task(self._remove())
        await asyncio.shield(self._removal)

    # ------------------------------------------------------------ inside

    def _pool(self, name: str) -> ActorPool:
        if name not in self._pools:
            self._pools[name] = ActorPool(self._app, name, self._actor_class, self._dirty.set, self._noticed, self._log)
        return self._pools[name]

    async def _open_exporter(self, config: WordsConfig) -> None:
        """Workers matter more than their count: without a port for it the controller says so and goes on."""
        if self._exporter is not None:
            await asyncio.to_thread(self._exporter.stop)
        self._export = None
        self._exporter = Exporter(self._metrics, config)
        try:
            address = await asyncio.to_thread(self._exporter.start)
        except ConfigError as error:
            self._log.error("the controller exports no metrics", error=str(error))
            return
        self._export = Export(name="controller", incarnation=uuid4().hex, address=address, roles=("controller",))

    async def _adopt(self) -> None:
        """Workers of a former controller, found by name; places without a worker are freed."""
        actors, groups = await asyncio.to_thread(_standing_names, self._app)
        await asyncio.gather(*(self._pool(name.pool).adopt(name) for name in actors))
        for name in groups - actors:
            await asyncio.to_thread(remove_worker, name)

    def _current(self) -> Membership:
        members: list[Member] = [member for pool in self._pools.values() for member in pool.members()]
        return self._membership.next(members)

    async def _publish(self) -> None:
        """The one place where the membership changes: ingresses are woken, workers told."""
        self._dirty.set()
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            self._keep_stale()
            async with self._published:
                current = self._current()
                if current is self._membership:
                    continue
                self._membership = current
                self._census.take(current)
                self._published.notify_all()
            wire = current.to_wire()
            for pool in self._pools.values():
                pool.push(wire)

    def _keep_stale(self) -> None:
        """Of two compatibility hashes side by side the old one serves until the new one can: in all roles."""
        if self._config is None or self._removal is not None:
            return
        roles = {role for pool in self._config.pools.values() if pool.workers for role in pool.roles}
        fresh = [member for name in self._config.pools for member in self._pool(name).fresh()]
        for pool in self._pools.values():
            pool.keep_stale(not serves(fresh, roles))

    async def _scale(self) -> None:
        """Once a second, never per request: asks the workers what they have to do, and resizes their pools."""
        while True:
            await asyncio.sleep(_SCALE_S)
            if not self._scaler.enabled or self._removal is not None:
                continue
            names = [name for name in self._scaler.sizes() if name in self._pools]
            loads = await asyncio.gather(*(self._pools[name].load() for name in names))
            self._scaler.step(dict(zip(names, loads, strict=True)), time.monotonic(), self._log)
            if self._removal is None:
                for name, size in self._scaler.sizes().items():
                    self._pool(name).resize(size)

    async def _watch_nodes(self) -> None:
        """Once a second: whoever stands on a node that Ray is told to take out goes before it."""
        nodes = LeavingNodes()
        while True:
            await asyncio.sleep(_NODES_S)
            try:
                places = await asyncio.to_thread(nodes.places)
            except RayError as error:  # the next look tells
                self._log.debug("nodes not known", reason=reason_of(error))
                continue
            for pool in self._pools.values():
                pool.leave(places)

    async def _noticed(self) -> None:
        """Returns when every living ingress acts by the present membership, or does not answer."""
        self._dirty.set()
        current = self._current().version

        def all_seen() -> bool:
            return all(ingress.seen_version >= current for ingress in self._live_ingresses())

        try:
            async with asyncio.timeout(_NOTICE_S), self._published:
                await self._published.wait_for(all_seen)
        except TimeoutError:
            self._log.warning("an ingress has not heard of a draining worker", elapsed_s=_NOTICE_S)

    def _live_ingresses(self) -> list[_Ingress]:
        oldest = time.monotonic() - _SILENT_S
        for ingress_id in [key for key, ingress in self._ingresses.items() if ingress.renewed_at < oldest]:
            del self._ingresses[ingress_id]
        return list(self._ingresses.values())

    async def _guard_lease(self) -> None:
        while True:
            lease = (self._config.controller if self._config else ControllerConfig()).ingress_lease_s
            left_s = self._last_renewal + lease - time.monotonic()
            if left_s <= 0:
                self._log.warning("no ingress: removing everything", age_s=lease)
                await self.remove()
                return
            await asyncio.sleep(min(left_s, 1.0))

    async def _remove(self) -> None:
        await asyncio.gather(*(pool.drain() for pool in self._pools.values()))
        self._log.info("removed")
        me = ray.get_runtime_context().current_actor
        # After the answer is on its way.
        asyncio.get_running_loop().call_later(0.2, lambda: ray.kill(me, no_restart=True))

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A loop that fails would leave a controller that answers and does nothing: end, and let Ray restart it."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._log.error("the controller failed", exception=error)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=False)


def _standing_names(app: str) -> tuple[set[ActorName], set[ActorName]]:
    """Workers of `app`: (actors, placement groups)."""
    actors: Any = list_named_actors(all_namespaces=True)  # Ray's annotation knows only the other answer
    groups = (entry["name"] for entry in placement_group_table().values() if entry["state"] != "REMOVED")
    return _workers_of(app, (a["name"] for a in actors if a["namespace"] == NAMESPACE)), _workers_of(app, groups)


def _workers_of(app: str, names: Iterable[str | None]) -> set[ActorName]:
    parsed = (ActorName.parse(name) for name in names if name)
    return {name for name in parsed if name is not None and name.app == app}

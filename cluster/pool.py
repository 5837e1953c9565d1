"""ActorPool: the workers of one pool as Ray actors. Start, watch, replace, drain, resize, adopt.

Lives in the event loop of the controller, the only owner of pools; nothing here is thread-safe. What a pool does
next is decided in `cluster.reconcile`; this file does it. A worker is one detached actor, named
`<app>:<pool>:<index>:<first 8 of the incarnation>`, in a detached placement group of the same name: both outlive
the controller, and the next controller finds them by name.

The actor class (`workers.actor.WorkerActor`; passed in, never imported) is constructed with a WorkerSpec and has

    describe() -> Description               at once, also while it starts
    start() -> bytes                        Membership wire of one member, READY; a second call joins the first
    alive() -> None                         never returns: it fails when the process dies
    healthy() -> bool                       false: it has work and does not step
    load() -> WorkerLoad | None             since the last call; none: it is not ready
    update_members(wire: bytes) -> None     Membership wire; versions not above the last one are dropped
    drain(timeout_s: float) -> None         refuse new requests, return when the open ones have ended or time is up
    stop() -> None                          close everything; the actor is killed afterwards
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actor_calls import NAMESPACE, call, call_within, only_member, reason_of, remove_worker
from cluster.autoscaler import PoolLoad, WorkerLoad
from cluster.config import SluiceConfig
from cluster.errors import SluiceError
from cluster.log import Log
from cluster.membership import Member, MemberState
from cluster.placement import place_one, worker_name
from cluster.pooled_worker import ActorHandle, PooledWorker
from cluster.reconcile import PoolSize, Wanted, backoff_s, decide
from cluster.worker_spec import ActorName, Description, Failure, WorkerSpec, fingerprint

_SURGE_WAIT_S = 10.0  # for the cluster to reserve room for a successor
_PROVEN_S = 30.0  # a worker that was ready for so long starts its place's count of failures anew
_LOAD_S = 1.0  # for a worker to say what it has to do
_LAST_WORDS_S = 5.0  # for the answer to stop(), and to a drain whose time is up


class ActorPool:
    """`changed` is called after every change of `members`. `noticed` returns when routers know the latest ones."""

    def __init__(
        self,
        app: str,
        name: str,
        actor_class: type,
        changed: Callable[[], None],
        noticed: Callable[[], Awaitable[None]],
        log: Log,
    ) -> None:
        self.name = name
        self._app = app
        self._actor_class = actor_class
        self._changed = changed
        self._noticed = noticed
        self._log = log.bind(pool=name)
        self._config: SluiceConfig | None = None
        self._wanted = Wanted(num_workers=0, fingerprint="")
        self._workers: list[PooledWorker] = []  # oldest first
        self._failures: dict[int, Failure] = {}
        self._not_before: dict[int, float] = {}
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop_task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ what the controller asks

    def members(self) -> tuple[Member, ...]:
        return tuple(worker.member for worker in self._workers)

    def failures(self) -> tuple[Failure, ...]:
        """Of places that have no ready worker now."""
        ready = {w.index for w in self._workers if w.member.state is MemberState.READY}
        return tuple(failure for index, failure in sorted(self._failures.items()) if index not in ready)

    def fresh(self) -> tuple[Member, ...]:
        """Those that are as the config wants them."""
        return tuple(w.member for w in self._workers if w.fingerprint == self._wanted.fingerprint)

    async def load(self) -> PoolLoad:
        """Asks every ready worker; one that does not answer in time is left out."""
        ready = [worker for worker in self._workers if worker.member.state is MemberState.READY]
        loads = await asyncio.gather(*(self._load(worker) for worker in ready))
        return PoolLoad(
            workers=tuple(load for load in loads if load is not None),
            num_pending=max(0, self._wanted.num_workers - len(ready)),
        )

    def start(self, config: SluiceConfig, size: PoolSize | None = None) -> None:
        """Brings the pool to what `config` says; returns at once. A pool that it does not name is drained. `size`: its
        present size, where that is the autoscaler's to say."""
        pool = config.pools.get(self.name)
        self._config = config
        roles = size.roles if size else (pool.roles,) * pool.workers if pool else ()
        self._wanted = Wanted(
            num_workers=len(roles),
            fingerprint=fingerprint(config, self.name) if pool else "",
            roles=roles,
            keeps_stale=True,
        )
        self._not_before.clear()
        self._failures.clear()
        self._wake.set()
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._run())

    def resize(self, size: PoolSize) -> None:
        """Another number of workers, or other roles, of the same config; returns at once."""
        self._want(replace(self._wanted, num_workers=size.num_workers, roles=size.roles))

    def keep_stale(self, keeps_stale: bool) -> None:
        """Whether workers of other weights stay while their successors cannot serve."""
        self._want(replace(self._wanted, keeps_stale=keeps_stale))

    def leave(self, places: Collection[str]) -> None:
        """Workers in these placement groups, whose nodes are to go, get successors elsewhere and are drained."""
        for worker in self._workers:
            if not worker.leaving and str(worker.actor_name) in places:
                self._log.info("leaving", worker=worker.member.name, incarnation=worker.member.incarnation)
                worker.leaving = True
                self._wake.set()

    async def adopt(self, actor_name: ActorName) -> None:
        """Takes over a worker that a former controller started. One that cannot be reached is removed."""
        try:
            actor = await asyncio.to_thread(ray.get_actor, str(actor_name), NAMESPACE)
            description: Description = await call_within(_LAST_WORDS_S, actor.describe)
        except (RayError, ValueError, TimeoutError) as error:
            self._log.warning("not adopted", worker=str(actor_name), error=reason_of(error))
            await asyncio.to_thread(remove_worker, actor_name)
            return
        worker = PooledWorker(actor_name, only_member(description.member), description.fingerprint)
        worker.actor, worker.placed = actor, True
        if worker.member.state is not MemberState.STARTING:
            worker.ready_at = time.monotonic()
        self._log.info("adopted", worker=worker.member.name, incarnation=worker.member.incarnation)
        draining = worker.member.state is MemberState.DRAINING
        self._workers.append(worker)
        self._spawn(self._live(worker))
        if draining:
            self._spawn(self._retire(worker))
        self._changed()

    def push(self, wire: bytes) -> None:
        """Tells every placed worker who is alive."""
        for worker in self._workers:
            if worker.placed and not worker.retired:
                self._spawn(self._tell(worker, wire))

    async def drain(self) -> None:
        """Every worker ends its requests and goes; returns when the pool is empty, and starts nothing again."""
        self._want(replace(self._wanted, num_workers=0, roles=()))
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._run())
        while self._workers:
            await asyncio.sleep(0.02)
        self._loop_task.cancel()
        await asyncio.gather(self._loop_task, *self._tasks, return_exceptions=True)

    # ------------------------------------------------------------ the loop

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            now = time.monotonic()
            standing = [worker.standing(now) for worker in self._workers]
            actions = decide(standing, self._wanted, now, self._not_before, _SURGE_WAIT_S)
            for incarnation in actions.drain:
                worker = next(w for w in self._workers if w.member.incarnation == incarnation)
                worker.member = replace(worker.member, state=MemberState.DRAINING)
                self._spawn(self._retire(worker))
            for index in actions.start:
                self._launch(index)
            for index in actions.switch:
                self._switch(index)
            if actions.start or actions.drain or actions.switch:
                self._changed()
            try:
                async with asyncio.timeout(self._check_s):
                    await self._wake.wait()
            except TimeoutError:
                pass

    @property
    def _check_s(self) -> float:
        return self._config.controller.check_s if self._config else 0.5

    def _launch(self, index: int) -> None:
        assert self._config is not None
        incarnation = uuid4().hex
        name = worker_name(self.name, index)
        roles = self._wanted.roles[index]
        member = Member(name=name, pool=self.name, incarnation=incarnation, address="", roles=roles)
        worker = PooledWorker(ActorName(self._app, self.name, index, incarnation[:8]), member, self._wanted.fingerprint)
        self._workers.append(worker)
        self._log.info("starting", worker=name, incarnation=incarnation)
        self._spawn(self._live(worker))

    def _switch(self, index: int) -> None:
        """The membership tells the worker itself, and the routers."""
        for worker in self._workers:
            if worker.index == index and worker.fingerprint == self._wanted.fingerprint:
                roles = self._wanted.roles[index]
                self._log.info("switching", worker=worker.member.name, role=",".join(roles))
                worker.member = replace(worker.member, roles=roles)

    def _want(self, wanted: Wanted) -> None:
        if wanted != self._wanted:
            self._wanted = wanted
            self._wake.set()

    # ------------------------------------------------------------ one worker

    async def _live(self, worker: PooledWorker) -> None:
        """From the actor's creation to its end, whatever that is."""
        lasting = False
        try:
            if worker.actor is None:
                worker.actor, group = await asyncio.to_thread(self._create, worker)
                self._spawn(self._await_room(worker, group))
                if worker.retired:  # meanwhile; what was to be removed was not there yet
                    raise TimeoutError("no longer wanted")
            await self._bring_up(worker)
            reason = await self._watch(worker)
        except (RayError, ValueError, TimeoutError) as error:
            reason, lasting = reason_of(error), isinstance(error, SluiceError)
        await self._bury(worker, reason, lasting)

    async def _bring_up(self, worker: PooledWorker) -> None:
        assert self._config is not None or worker.placed
        start_timeout_s = self._config.controller.start_timeout_s if self._config else 300.0
        try:
            async with asyncio.timeout(start_timeout_s):
                await call(worker.actor.describe)  # answered as soon as the process runs
                worker.placed = True
                if worker.member.state is not MemberState.STARTING:
                    return
                started = only_member(await call(worker.actor.start))
        except TimeoutError:
            where = "did not get ready" if worker.placed else "found no room in the cluster (nodes, cpus, gpus)"
            raise TimeoutError(
                f"{worker.member.name} {where} within controller.start_timeout_s = {start_timeout_s:g}"
            ) from None
        if worker.member.state is MemberState.STARTING:  # it may be draining by now
            worker.member = replace(started, roles=worker.member.roles)
            worker.ready_at = time.monotonic()
            self._log.info(
                "ready", worker=started.name, incarnation=started.incarnation, address=started.address, pid=started.pid,
                elapsed_s=worker.ready_at - worker.asked_at,
            )  # fmt: skip
            self._changed()
            self._wake.set()

    async def _watch(self, worker: PooledWorker) -> str:
        """Returns why the worker is no more, or no longer worth keeping."""
        ended = asyncio.ensure_future(call(worker.actor.alive))
        try:
            while True:
                await asyncio.wait({ended}, timeout=self._check_s)
                if ended.done():
                    error = ended.exception()
                    return reason_of(error) if error else "its process ended"
                step_timeout_s = self._config.words.step_timeout_s if self._config else 5.0
                try:
                    if not await call_within(2 * step_timeout_s, worker.actor.healthy):
                        return f"it has work and has not stepped for {step_timeout_s:g} s"
                except TimeoutError:
                    return f"no answer for {2 * step_timeout_s:g} s"
        finally:
            ended.cancel()

    async def _retire(self, worker: PooledWorker) -> None:
        """A worker marked DRAINING finishes what it has and is stopped."""
        worker.retired = True
        timeout_s = self._config.controller.drain_timeout_s if self._config else 300.0
        self._log.info("draining", worker=worker.member.name, incarnation=worker.member.incarnation)
        if worker.ready_at is not None:
            await self._noticed()
            try:
                await call_within(timeout_s + _LAST_WORDS_S, worker.actor.drain, timeout_s)
                await call_within(_LAST_WORDS_S, worker.actor.stop)
            except (RayError, TimeoutError) as error:
                self._log.warning("not drained", worker=worker.member.name, reason=reason_of(error))
        await asyncio.to_thread(remove_worker, worker.actor_name)

    async def _bury(self, worker: PooledWorker, reason: str, lasting: bool) -> None:
        now = time.monotonic()
        if worker.retired:
            self._log.info("stopped", worker=worker.member.name, incarnation=worker.member.incarnation)
        else:
            proven = worker.ready_at is not None and now - worker.ready_at > _PROVEN_S
            before = self._failures.get(worker.index)
            count = 1 if before is None or proven else before.count + 1
            self._failures[worker.index] = Failure(
                worker=worker.member.name, count=count, error=reason, lasting=lasting
            )
            self._not_before[worker.index] = now + backoff_s(count)
            self._log.warning(
                "lost", worker=worker.member.name, incarnation=worker.member.incarnation, reason=reason,
                num_restarts=count,
            )  # fmt: skip
        self._workers.remove(worker)
        self._changed()
        self._wake.set()
        await asyncio.to_thread(remove_worker, worker.actor_name)

    async def _load(self, worker: PooledWorker) -> WorkerLoad | None:
        try:
            return await call_within(_LOAD_S, worker.actor.load)
        except (RayError, TimeoutError):
            return None

    async def _tell(self, worker: PooledWorker, wire: bytes) -> None:
        try:
            await call(worker.actor.update_members, wire)
        except RayError as error:  # its death is the watcher's business
            self._log.debug("members not delivered", worker=worker.member.name, reason=reason_of(error))

    async def _await_room(self, worker: PooledWorker, group: PlacementGroup) -> None:
        """A process may take long to start; that is no lack of room."""
        while not worker.placed and worker in self._workers:
            entry = await asyncio.to_thread(placement_group_table, group)
            if entry["state"] == "CREATED":
                worker.placed = True
            else:
                await asyncio.sleep(self._check_s)

    def _create(self, worker: PooledWorker) -> tuple[ActorHandle, PlacementGroup]:
        """Blocks for some milliseconds: called in a thread. The actor waits in Ray for its placement group."""
        assert self._config is not None
        placement = place_one(self.name, self._config.pools[self.name], worker.index)
        name = str(worker.actor_name)
        group = placement_group(
            [bundle.resources() for bundle in placement.bundles],
            strategy=placement.strategy,
            name=name,
            lifetime="detached",
        )
        bundle = placement.bundles[0]  # one rank today
        spec = WorkerSpec(
            name=worker.member.name,
            pool=self.name,
            incarnation=worker.member.incarnation,
            fingerprint=worker.fingerprint,
            config=self._config.model_dump_json(),
        )
        actor = (
            ray.remote(self._actor_class)
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=0,
                num_cpus=bundle.cpus,
                num_gpus=bundle.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            )
            .remote(spec)
        )
        return actor, group

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("a pool's task failed", exception=error, error=reason_of(error))

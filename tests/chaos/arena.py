"""The cluster that is hurt: worker processes, ingress processes with their clients, on one host or on two.

Whatever happens in it goes into the report, as it happens. Nothing here decides what to do to whom.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress

from cluster.errors import SessionError
from cluster.membership import Membership
from cluster.protos import worker_pb2 as pb
from tests.chaos.answers import FAMILY
from tests.chaos.crowd import CANCELS, CrowdProcess, Members, Pace
from tests.chaos.questions import Question
from tests.chaos.record import Asked, Death, Ended, Gone, Got, Line, Notice, Report, Rest
from tests.support.checkpoints import checkpoint
from tests.support.hanging_worker import Broken, serve
from tests.support.hosts import Host, hosts, serve_on
from tests.support.plain_cluster import FORKS, PlainCluster, WorkerProcess, plain_cluster
from tests.support.process_end import ended_at
from tests.support.watch import Watch

FORKS.set_forkserver_preload(["tests.support.hanging_worker", "tests.chaos.crowd"])
SETTINGS: Mapping[str, object] = {
    "model.path": str(checkpoint(FAMILY)),
    "kv.block_size": 16,
    "kv.num_blocks": 224,
    "scheduler.max_batched_tokens": 64,
    "scheduler.chunk_tokens": 32,
    "scheduler.max_sequences": 16,
    "scheduler.max_waiting": 12,
    "router.worker_wait_s": 60.0,
    "router.temperature": 4.0,  # all ways are gone, also the dearer ones
    "limits.max_requests": 32,  # of each ingress: nobody tells them of one another
    "limits.max_queued": 16,
    "transfer.late_read_s": 0.5,
    "transfer.stuck_read_s": 2.0,
    "words.redial_max_s": 0.3,
    "log.level": "error",
}
NUM_PREFILL, NUM_DECODE = 2, 2
ALONE = frozenset({"prefill-0", "decode-1"})  # on the host that may be cut off
INGRESSES = "sluice_words_sessions|peer_kind=ingress"  # a metric of workers
NUM_OWN = 1  # the session of this process, as the router of the cluster
REST_S = 60.0
PATIENCE_S = 300.0  # a machine that others keep busy is no failure


class Open:
    """The requests that clients wait for, as they tell it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._has_tokens: dict[str, dict[str, bool]] = {}  # by ingress, by request

    def hear(self, ingress: str, line: Line) -> None:
        with self._lock:
            requests = self._has_tokens.setdefault(ingress, {})
            match line:
                case Asked():
                    requests[line.request] = False
                case Got():
                    requests[line.request] = True
                case Ended():
                    del requests[line.request]
                case _:
                    pass

    def gone(self, ingress: str) -> None:
        with self._lock:
            self._has_tokens.pop(ingress, None)

    def of(self, ingress: str) -> dict[str, bool]:
        """Whether it has tokens, by request."""
        with self._lock:
            return dict(self._has_tokens.get(ingress, {}))

    def every(self) -> set[str]:
        with self._lock:
            return {request for requests in self._has_tokens.values() for request in requests}


class Arena:
    def __init__(self, cluster: PlainCluster, report: Report, asked: list[Question], lonely: Host | None) -> None:
        self.cluster = cluster
        self.watch = Watch(cluster)
        self.lonely = lonely
        self.open = Open()
        self.began_at = time.monotonic()
        self.crowds: dict[str, CrowdProcess] = {}
        self._report = report
        self._asked = asked
        self._version = 1_000_000  # above the cluster's own
        self._num_crowds = 0
        self._killed: set[int] = set()  # pids
        self._noted: set[int] = set()
        self._readers: dict[str, threading.Thread] = {}
        self._stopping = threading.Event()

    def now(self) -> float:
        return time.monotonic() - self.began_at

    def write(self, line: Line) -> None:
        """Times of other processes are of the machine's clock."""
        self._report.add(line)

    # ------------------------------------------------------------ life

    def membership(self) -> bytes:
        self._version += 1
        members = tuple(w.member for w in self.cluster.workers.values() if w.member is not None)
        return Membership(self._version, members).to_wire()

    def publish(self) -> None:
        self.cluster.publish()
        wire = self.membership()
        for crowd in self.crowds.values():
            crowd.send(Members(wire))

    async def start_crowd(self, name: str, *, cancels: float = CANCELS) -> None:
        self._num_crowds += 1

        def hear(line: Line) -> None:
            self.open.hear(name, line)
            at_s = getattr(line, "at_s", None)
            self.write(line if at_s is None else line.model_copy(update={"at_s": at_s - self.began_at}))

        crowd = CrowdProcess(self.cluster.config, name, self._asked, self._num_crowds, hear, cancels=cancels)
        await asyncio.to_thread(crowd.start, self.membership())
        self.crowds[name] = crowd

    def pace(self, num_clients: int) -> None:
        """Of each ingress."""
        for crowd in self.crowds.values():
            crowd.send(Pace(num_clients))

    async def start_worker(self, name: str) -> None:
        """A successor, or a first one; known to everybody, and warm."""
        await self.cluster.start_worker(name.partition("-")[0], name)
        self.listen(self.cluster.workers[name])
        self.publish()

    def listen(self, worker: WorkerProcess) -> None:
        """Hears what its engine thread says of broken sessions, until it ends."""

        def read() -> None:
            with suppress(EOFError, OSError):
                while not self._stopping.is_set():
                    if not worker.pipe.poll(0.1):
                        continue
                    told = worker.pipe.recv()
                    assert isinstance(told, Broken), told
                    at_s = told.at - self.began_at
                    self.write(Notice(at_s=at_s, peer=told.incarnation, by=worker.name, reason=told.reason))

        reader = threading.Thread(target=read, name=f"{worker.name}-told", daemon=True)
        reader.start()
        self._readers[worker.name] = reader

    def pid(self, name: str) -> int:
        process = self.crowds[name].process if name in self.crowds else self.cluster.workers[name].process
        assert process.pid is not None
        return process.pid

    def signal(self, name: str, number: int) -> None:
        pid = self.pid(name)
        with suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                self._killed.add(pid)
                threading.Thread(target=self._see_end, args=(pid, os.pidfd_open(pid)), daemon=True).start()
            os.kill(pid, number)

    def _see_end(self, pid: int, pidfd: int) -> None:
        self.write(Gone(at_s=ended_at(pidfd, PATIENCE_S) - self.began_at, pid=pid))

    async def bury(self, name: str) -> None:
        """Of a killed process: all that it told has been heard, and nobody counts on it."""
        crowd = self.crowds.pop(name, None)
        if crowd is not None:
            await asyncio.to_thread(crowd.join)
            self.open.gone(name)
            return
        worker = self.cluster.workers.pop(name)
        assert worker.member is not None
        self.watch.forget(worker.member.incarnation)
        await asyncio.to_thread(worker.process.join)
        await asyncio.to_thread(self._readers.pop(name).join)
        worker.pipe.close()

    def note_deaths(self) -> None:
        """Processes that ended and that nobody killed."""
        processes = [(name, worker.process) for name, worker in self.cluster.workers.items()]
        processes += [(name, crowd.process) for name, crowd in self.crowds.items()]
        for name, process in processes:
            pid = process.pid
            if process.exitcode is not None and pid is not None and pid not in self._killed | self._noted:
                self._noted.add(pid)
                self.write(Death(at_s=self.now(), name=name, exit_code=process.exitcode))

    # ------------------------------------------------------------ looking

    async def ask(self, name: str) -> pb.AdminResponse | None:
        """None: it does not answer."""
        try:
            async with asyncio.timeout(1.0):
                return await self.watch.ask(name)
        except (TimeoutError, SessionError):
            return None

    async def until(self, holds: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
        await self.cluster.until(holds, what, timeout_s)

    async def until_warm(self) -> None:
        """Every ingress has its sessions too: one that has just woken up does not know yet that they broke."""
        await self.cluster.until_warm(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            counters = await self.cluster.counters()
            sessions = {name: values.get(INGRESSES, 0) for name, values in counters.items()}
            if len(sessions) == len(self.cluster.workers) and min(sessions.values()) >= len(self.crowds) + NUM_OWN:
                return
            assert time.monotonic() < deadline, f"sessions with ingresses: {sessions}"
            await asyncio.sleep(0.02)

    async def until_nothing_is_open(self) -> None:
        await self.until(lambda: not self.open.every(), "nobody asks for anything")

    async def rest(self) -> None:
        """Waits until nothing is held, or for some time; then writes down what is. Nobody may be asking."""
        await self.until_nothing_is_open()
        deadline = time.monotonic() + REST_S
        while True:
            loads = await self.cluster.router.load()
            held = any(is_held(answer.load) for answer in loads.values())
            if (not held and len(loads) == len(self.cluster.workers)) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.02)
        for cleared in (False, True):
            answers = await (self.cluster.router.clear_cache() if cleared else self.cluster.router.load())
            for name, worker in self.cluster.workers.items():
                assert worker.member is not None
                answer = answers.get(worker.member.incarnation)
                if answer is not None:
                    self.write(rest_of(name, answer.load, self.now(), cleared=cleared))

    def stop(self) -> None:
        self.watch.stop()
        for crowd in self.crowds.values():
            crowd.stop()
        for name in self.cluster.workers:
            self.signal(name, signal.SIGCONT)
        self._stopping.set()
        for reader in self._readers.values():
            reader.join()


def rest_of(worker: str, load: pb.LoadReport, at_s: float, *, cleared: bool) -> Rest:
    groups = load.groups
    return Rest(
        at_s=at_s,
        worker=worker,
        cleared=cleared,
        num_blocks=sum(group.num_blocks for group in groups),
        free=sum(group.free for group in groups),
        filling=sum(group.filling for group in groups),
        ready=sum(group.ready for group in groups),
        cached=sum(group.cached for group in groups),
        quarantined=sum(group.quarantined for group in groups),
        leases=load.num_leases,
        num_requests=load.num_waiting + load.num_running + load.num_pulling,
    )


def is_held(load: pb.LoadReport) -> bool:
    return bool(load.num_leases) or any(g.filling or g.ready or g.quarantined for g in load.groups)


@asynccontextmanager
async def arena(
    report: Report,
    asked: list[Question],
    settings: Mapping[str, object],
    *,
    num_crowds: int,
    two_hosts: bool,
    cancels: float = CANCELS,
) -> AsyncIterator[Arena]:
    """On two hosts, bytes go over TCP; the first prefill and the last decode worker live alone on one of them."""
    every = {**SETTINGS, **settings, **({"transfer.ucx_tls": "tcp,self"} if two_hosts else {})}
    if not two_hosts:
        async with _arena(report, asked, every, num_crowds, None, cancels) as made:
            yield made
        return
    with hosts(2) as (lonely, other):
        async with _arena(report, asked, every, num_crowds, (lonely, other), cancels) as made:
            yield made


@asynccontextmanager
async def _arena(
    report: Report,
    asked: list[Question],
    settings: Mapping[str, object],
    num_crowds: int,
    places: tuple[Host, Host] | None,
    cancels: float,
) -> AsyncIterator[Arena]:
    names = [*(f"prefill-{i}" for i in range(NUM_PREFILL)), *(f"decode-{i}" for i in range(NUM_DECODE))]
    main = serve
    if places is not None:
        lonely, other = places
        main = serve_on({name: lonely if name in ALONE else other for name in names}, serve)
    async with plain_cluster(settings, prefill=NUM_PREFILL, decode=NUM_DECODE, main=main) as cluster:
        made = Arena(cluster, report, asked, places[0] if places else None)
        try:
            for worker in cluster.workers.values():
                made.listen(worker)
            await asyncio.gather(
                *(made.start_crowd(f"ingress-{index}", cancels=cancels) for index in range(num_crowds))
            )
            yield made
        finally:
            made.stop()

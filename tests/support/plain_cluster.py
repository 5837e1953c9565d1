"""A cluster without Ray: real worker processes, a real router in this one, over real sockets and NIXL.

Workers come from a fork server that has imported everything once, so that a killed one is replaced in no time.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from uuid import uuid4

from cluster import config_file
from cluster.config import SluiceConfig
from cluster.log import Log
from cluster.membership import Member, Membership
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import FinishReason, Hypothesis, SamplingParams, TokenLogprobs
from cluster.words_thread import WordsThread
from router.flight import RouterRequest
from router.router import Router
from workers import standalone
from workers.worker import Worker

SECRET = b"a secret for tests"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["workers.standalone"])


@dataclass(slots=True)
class WorkerProcess:
    name: str
    pool: str
    process: ForkServerProcess
    pipe: Connection
    member: Member | None = None

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a client got for one request."""

    token_ids: list[int]
    finish: FinishReason
    route: pb.Route
    attempt: int
    logprobs: list[TokenLogprobs]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    embedding: tuple[float, ...]
    hypotheses: tuple[Hypothesis, ...]


def serve(config: SluiceConfig, pool: str, name: str, pipe: Connection) -> None:
    """In the worker's process."""
    run(standalone.make_worker(config, pool, name, SECRET), pipe)


def run(worker: Worker, pipe: Connection) -> None:
    """Tells who it is, then hears who is there, until the pipe is closed."""
    pipe.send_bytes(Membership(1, (worker.start(),)).to_wire())
    try:
        while True:
            worker.update_members(Membership.from_wire(pipe.recv_bytes()))
    except (EOFError, OSError):
        worker.stop()


WorkerMain = Callable[[SluiceConfig, str, str, Connection], None]


@dataclass(slots=True)
class PlainCluster:
    config: SluiceConfig
    router: Router
    metrics: Metrics
    words: WordsThread
    main: WorkerMain = serve  # of the workers to come
    workers: dict[str, WorkerProcess] = field(default_factory=dict)
    _version: int = 0

    # ------------------------------------------------------------ life

    async def start_worker(self, pool: str, name: str) -> None:
        ours, theirs = FORKS.Pipe()
        process = FORKS.Process(target=self.main, args=(self.config, pool, name, theirs), daemon=True)
        await asyncio.to_thread(process.start)
        theirs.close()
        worker = WorkerProcess(name, pool, process, ours)
        self.workers[name] = worker
        wire = await asyncio.to_thread(ours.recv_bytes)
        worker.member = Membership.from_wire(wire).members[0]

    def publish(self) -> None:
        """What the controller does: everybody learns who is alive."""
        self._version += 1
        members = tuple(worker.member for worker in self.workers.values() if worker.member is not None)
        membership = Membership(self._version, members)
        for worker in self.workers.values():
            try:
                worker.pipe.send_bytes(membership.to_wire())
            except OSError:
                continue  # killed
        self.router.update_membership(membership)

    async def kill(self, name: str) -> None:
        worker = self.workers.pop(name)
        with suppress(ProcessLookupError):  # it was dead already
            worker.signal(signal.SIGKILL)
        await asyncio.to_thread(worker.process.join)
        worker.pipe.close()

    async def replace(self, name: str) -> None:
        """A new incarnation under the name of a killed worker, known to everybody."""
        pool = name.rpartition("-")[0]
        await self.start_worker(pool, name)
        self.publish()
        await self.until_warm()

    async def until(self, holds: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
            await asyncio.sleep(0.005)

    async def until_warm(self, timeout_s: float = 30.0) -> None:
        """Every decode worker can read from every source, and a prefill worker from every encoder."""
        deadline = time.monotonic() + timeout_s
        while True:
            loads = await self.router.load()
            members = [w.member for w in self.workers.values() if w.member]
            sources = {m.incarnation for m in members if {"prefill", "encode"} & set(m.roles)}
            encoders = {m.incarnation for m in members if "encode" in m.roles}
            sinks = {m.incarnation: sources for m in members if "decode" in m.roles}
            sinks |= {m.incarnation: encoders for m in members if {"prefill", "decode"} & set(m.roles) == {"prefill"}}
            warm = {
                incarnation: {pair.source_incarnation for pair in answer.load.pairs if pair.warm}
                for incarnation, answer in loads.items()
            }
            everyone = len(loads) == len(self.workers)
            if (
                everyone
                and all(warm[sink] >= wanted - {sink} for sink, wanted in sinks.items())
                and self.router.ready()
            ):
                return
            assert time.monotonic() < deadline, f"not warm: {warm}; {self.router.why_not_ready()}"
            await asyncio.sleep(0.02)

    # ------------------------------------------------------------ requests

    async def stream(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        request_id: str = "",
        *,
        deadline_s: float | None = None,
        leader_id: str = "",
        encoder_token_ids: tuple[int, ...] = (),
        cache_salt: str = "",
    ) -> AsyncGenerator[tuple[list[int], Answer | None]]:
        """New tokens; the whole answer with the last ones."""
        request = RouterRequest(
            request_id=request_id or uuid4().hex,
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            deadline_s=deadline_s,
            leader_id=leader_id,
            encoder_token_ids=encoder_token_ids,
            cache_salt=cache_salt,
        )
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        async for delta in self.router.generate(request):
            assert delta.first_index == len(tokens), "a token was lost or doubled"
            tokens += delta.token_ids
            logprobs += delta.logprobs
            assert not (delta.prompt_logprobs and delta.first_index), "prompt logprobs come with the first token"
            prompt_logprobs = prompt_logprobs or delta.prompt_logprobs
            answer = None
            if delta.finish is not None:
                assert delta.route is not None
                answer = Answer(
                    token_ids=tokens,
                    finish=delta.finish,
                    route=delta.route,
                    attempt=delta.attempt,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                    embedding=delta.embedding,
                    hypotheses=delta.hypotheses,
                )
            yield list(delta.token_ids), answer

    async def ask(
        self, prompt: list[int], sampling: SamplingParams, request_id: str = "", *, leader_id: str = ""
    ) -> Answer:
        answers = [answer async for _, answer in self.stream(prompt, sampling, request_id, leader_id=leader_id)]
        assert answers[-1] is not None
        return answers[-1]

    # ------------------------------------------------------------ counters

    async def counters(self) -> dict[str, Mapping[str, float]]:
        """By worker name: every metric of the worker."""
        by_incarnation = {w.member.incarnation: name for name, w in self.workers.items() if w.member}
        return {by_incarnation[incarnation]: a.counters for incarnation, a in (await self.router.load()).items()}

    async def total(self, metric: str, pool: str = "") -> float:
        """One metric over all workers of a pool, all labels added up."""
        counters = await self.counters()
        return sum(
            value
            for name, values in counters.items()
            if name.startswith(pool)
            for key, value in values.items()
            if key.partition("|")[0] == metric
        )

    async def assert_all_free(self, timeout_s: float = 30.0) -> None:
        """Nothing is held anywhere; and once the caches are cleared, every block is FREE."""
        await assert_all_free(self.router, len(self.workers), timeout_s)


async def assert_all_free(router: Router, num_workers: int, timeout_s: float = 30.0) -> None:
    """That many workers answer; nothing is held on any of them; and once the caches are cleared, every block is
    FREE."""
    deadline = time.monotonic() + timeout_s
    while True:
        loads = [answer.load for answer in (await router.load()).values()]
        held = [g for load in loads for g in load.groups if g.filling or g.ready or g.quarantined]
        if len(loads) == num_workers and not held and not any(load.num_leases for load in loads):
            break
        assert time.monotonic() < deadline, f"held after {timeout_s:g} s: {loads}"
        await asyncio.sleep(0.02)
    for answer in (await router.clear_cache()).values():
        assert all(group.free == group.num_blocks for group in answer.load.groups), answer.load


@asynccontextmanager
async def plain_cluster(
    settings: Mapping[str, object], *, prefill: int = 1, decode: int = 1, mixed: int = 0, main: WorkerMain = serve
) -> AsyncIterator[PlainCluster]:
    """`settings` are config values by dotted path; small heartbeats and quarantines are the default."""
    pools = {"prefill": {"workers": prefill}, "decode": {"workers": decode}}
    if mixed:
        pools = {"mixed": {"workers": mixed, "roles": ["prefill", "decode"]}}
    defaults = {
        "engine.device": "cpu",  # also where there is a GPU: it rounds otherwise
        "transfer.late_read_s": 0.5,
        "transfer.stuck_read_s": 2.0,
        "log.level": "warning",
        "pools": pools,
    }
    config = config_file.load(None, settings={**defaults, **settings})
    words = WordsThread(config=config.words).start()
    metrics = Metrics()
    identity = pb.Identity(kind=pb.INGRESS, name="ingress", incarnation=uuid4().hex)
    log = Log.open("router", config.log)
    router = Router(
        config.router, config.limits, words, identity, SECRET, metrics, log, block_size=config.kv.block_size
    )
    cluster = PlainCluster(config, router, metrics, words, main)
    try:
        await router.start()
        names = [(pool, f"{pool}-{index}") for pool, spec in config.pools.items() for index in range(spec.workers)]
        await asyncio.gather(*(cluster.start_worker(pool, name) for pool, name in names))
        cluster.publish()
        await cluster.until_warm()
        yield cluster
    finally:
        await router.stop()
        for worker in cluster.workers.values():
            worker.pipe.close()
        for worker in cluster.workers.values():
            await asyncio.to_thread(worker.process.join, 10)
            if worker.process.is_alive():
                worker.process.kill()
        words.stop()


@contextmanager
def running_cluster(
    settings: Mapping[str, object], *, prefill: int = 1, decode: int = 1, mixed: int = 0, main: WorkerMain = serve
) -> Iterator[tuple[PlainCluster, asyncio.Runner]]:
    """For tests that share a cluster: run their coroutines on the runner, its loop is the router's."""
    with asyncio.Runner() as runner:
        context = plain_cluster(settings, prefill=prefill, decode=decode, mixed=mixed, main=main)
        cluster = runner.run(context.__aenter__())
        try:
            yield cluster, runner
        finally:
            runner.run(context.__aexit__(None, None, None))

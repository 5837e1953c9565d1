"""An app in Serve and those who look at it: its replicas, what HAProxy holds of them, its workers, its clients."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from uuid import uuid4

import httpx
import psutil

from cluster.config import SluiceConfig
from cluster.log import Log
from cluster.membership import Member, Membership
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.words_thread import WordsThread
from deploy import life
from deploy.local_app import LocalApp, local_app
from deploy.local_cluster import LocalCluster
from router.router import Router
from tests.support.plain_cluster import assert_all_free
from tests.support.ray_cluster import all_ready

ANSWER_S = 60.0
_STATS_PORT = 3  # of the window that the cluster holds; and where replicas listen
_REPLICA_PORTS = range(10, 55)


@dataclass(frozen=True, slots=True)
class Replica:
    process: psutil.Process
    url: str  # of its own port, behind HAProxy

    async def num_open(self, client: httpx.AsyncClient) -> int:
        """Requests that it serves now."""
        metrics = (await client.get(f"{self.url}/metrics")).text
        return sum(int(float(line.split()[1])) for line in metrics.splitlines() if _OPEN in line and line[0] != "#")


_OPEN = "sluice_ingress_open_requests"


@dataclass(slots=True)
class Stream:
    """One client. `error` says how its connection broke, "" if it did not."""

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    error: str = ""
    ended: bool = False

    async def run(self, client: httpx.AsyncClient, url: str, body: dict[str, object]) -> None:
        try:
            async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    self._read(line, answer.status_code)
        except httpx.HTTPError as error:
            self.error = repr(error)
        if not self.ended:
            self.error = self.error or "the stream ended without its last word"
        self.ended = True

    def _read(self, line: str, status: int) -> None:
        text = line.removeprefix("data: ")
        if status != 200 or '"error"' in text:
            self.error = f"{status} {text}"
        elif text == "[DONE]":
            self.ended = True
        elif text:
            self.tokens += [token for choice in json.loads(text)["choices"] for token in choice["token_ids"]]


class ServedApp:
    """`client` speaks HTTP, `router` asks the workers; both belong to the loop they were made in."""

    def __init__(self, app: LocalApp, router: Router, client: httpx.AsyncClient) -> None:
        self.app = app
        self.client = client
        self._router = router

    @property
    def cluster(self) -> LocalCluster:
        assert self.app._cluster is not None
        return self.app._cluster

    def members(self) -> tuple[Member, ...]:
        return _membership(self.app.config.name).members

    # ------------------------------------------------------------ replicas

    def replicas(self) -> list[Replica]:
        """Those that listen."""
        base = self.cluster.ports.base
        ports = range(base + _REPLICA_PORTS.start, base + _REPLICA_PORTS.stop)
        found: list[Replica] = []
        for process in self.cluster.processes():
            try:
                if "ServeReplica" in " ".join(process.cmdline()):
                    sockets = [each.laddr for each in process.net_connections("tcp") if each.status == "LISTEN"]
                    found += [Replica(process, f"http://127.0.0.1:{s.port}") for s in sockets if s.port in ports]
            except psutil.NoSuchProcess:
                continue
        return found

    async def healthy(self) -> list[Replica]:
        """Replicas that would serve a request now, asked one by one."""
        found: list[Replica] = []
        for replica in self.replicas():
            try:
                answer = await self.client.get(f"{replica.url}/health")
            except httpx.HTTPError:
                continue
            found += [replica] if answer.status_code == 200 else []
        return found

    async def servers(self) -> set[str]:
        """Names of the replicas to which HAProxy sends requests now."""
        answer = await self.client.get(f"http://127.0.0.1:{self.cluster.ports.base + _STATS_PORT}/stats;csv")
        rows = csv.DictReader(answer.text.splitlines())
        return {r["svname"] for r in rows if r["svname"].startswith("SERVE_REPLICA") and r["status"] == "UP"}

    # ------------------------------------------------------------ clients and workers

    @asynccontextmanager
    async def streams(self, prompts: list[tuple[int, ...]], num_tokens: int) -> AsyncIterator[list[Stream]]:
        """Greedy ones, all asked for at once; all have ended, one way or the other, when the block has."""
        streams = [Stream(prompt) for prompt in prompts]
        body = {
            "model": self.app.config.served_name, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip
        async with asyncio.timeout(ANSWER_S), asyncio.TaskGroup() as tasks:
            for stream in streams:
                tasks.create_task(stream.run(self.client, self.app.url, {**body, "prompt": list(stream.prompt)}))
            yield streams

    async def ask(self, *, clear: bool = False) -> dict[str, pb.AdminResponse]:
        """Load and counters of every worker, by incarnation; with `clear` after its cache was emptied."""
        return await (self._router.clear_cache() if clear else self._router.load())

    async def assert_all_free(self) -> None:
        await assert_all_free(self._router, len(self.members()))


def _membership(app: str) -> Membership:
    return Membership.from_wire(life.status(app).membership)


async def until(holds: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(ANSWER_S):
            while not holds():
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"not within {ANSWER_S:g} s: {what}") from None


@contextmanager
def served_app(config: SluiceConfig, runner: asyncio.Runner) -> Iterator[ServedApp]:
    """A ready app. What it offers is to be used on the runner's loop."""
    with local_app(config, lambda _: None) as app, seen(app, runner) as served:
        yield served


@contextmanager
def seen(app: LocalApp, runner: asyncio.Runner) -> Iterator[ServedApp]:
    """Of an app that is ready; to its workers it looks like one more ingress replica."""
    context = _eyes(app)
    yield runner.run(context.__aenter__())
    runner.run(context.__aexit__(None, None, None))


@asynccontextmanager
async def _eyes(app: LocalApp) -> AsyncIterator[ServedApp]:
    config = app.config
    words = WordsThread(config=config.words).start()
    identity = pb.Identity(kind=pb.INGRESS, name="eyes", incarnation=uuid4().hex)
    log = Log.open("router", config.log)
    router = Router(
        config.router, config.limits, words, identity, _secret(app), Metrics(), log, block_size=config.kv.block_size
    )
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    try:
        await router.start()
        num_workers = sum(pool.workers for pool in config.pools.values())
        await until(lambda: all_ready(num_workers)(_membership(config.name)), "all workers are ready")
        router.update_membership(_membership(config.name))
        async with httpx.AsyncClient(timeout=ANSWER_S, trust_env=False, limits=limits) as client:
            yield ServedApp(app, router, client)
    finally:
        await router.stop()
        words.stop()


def _secret(app: LocalApp) -> bytes:
    """Of the cluster, which drew it; found where the workers find it."""
    assert app._cluster is not None
    name = app.config.words.secret_env
    environments = (process.environ() for process in app._cluster.processes())
    return next(environment[name] for environment in environments if name in environment).encode()

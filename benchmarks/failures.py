"""How fast death and silence are noticed, between real worker processes and an ingress, against the design's bounds.

    python -m benchmarks.failures [--kills 40] [--silences 5] [--json FILE]

Two prefill and two decode workers with the heartbeats of the default config; what is killed is replaced before the
next one dies. A time runs from the signal to the moment at which the survivor acts on it: the decode worker on its
engine thread, the ingress in its event loop.

  killed   SIGKILL: of a prefill worker, noticed by both decode workers; of a decode worker, noticed by the ingress
  frozen   SIGSTOP of a prefill worker: only its silence tells
  cut      the network of a prefill worker is unplugged (namespaces: needs root and iproute2, else it is left out)

Each idle and loaded: under streams in a closed loop, which keep every core busy. How long the kernel takes to end a
killed process stands beside it: before that its sockets are open, and nobody can notice anything.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from benchmarks import checkpoint
from benchmarks.report import Figure, Report, Setting, percentile, progress, publish
from cluster.config import SluiceConfig
from cluster.errors import SessionError, SluiceError
from cluster.request import SamplingParams
from cluster.session import Session
from tests.support.hosts import Host, hosts, serve_on
from tests.support.plain_cluster import SECRET, PlainCluster, WorkerMain, plain_cluster, run
from tests.support.process_end import ended_at
from workers import standalone

KILLED_S, KILLED_LOADED_S, SILENT_S = 0.1, 0.5, 2.0  # bounds: the first two for the p99
NUM_STREAMS = 8
PROMPT_TOKENS = 256
NOTICED_S = 30.0  # more is a failure of the benchmark
LOADS = ("idle", "loaded")

Scene = Callable[["Watched", int], Awaitable[list[float]]]  # seconds until each survivor had noticed


# ---------------------------------------------------------------- who notices


def serve(config: SluiceConfig, pool: str, name: str, pipe: Connection) -> None:
    """A worker that says into its pipe whose session broke, once its engine thread has acted on it."""
    worker = standalone.make_worker(config, pool, name, SECRET)
    heard = worker.on_broken

    def on_broken(session: Session, error: SessionError) -> None:
        heard(session, error)
        worker._post(partial(tell, session.peer.incarnation))

    def tell(incarnation: str) -> None:
        with suppress(OSError):  # at the end nobody listens
            pipe.send((incarnation, time.monotonic()))

    worker.on_broken = on_broken
    run(worker, pipe)


class Watched:
    """A cluster and when which of its survivors noticed what. Clocks of one machine's processes agree."""

    def __init__(self, cluster: PlainCluster) -> None:
        self.cluster = cluster
        self._ends: list[Awaitable[float]] = []
        self._at_ingress: dict[str, asyncio.Future[float]] = {}
        heard = cluster.router.on_broken
        loop = asyncio.get_running_loop()

        def on_broken(session: Session, error: SessionError) -> None:
            heard(session, error)
            loop.call_soon_threadsafe(self._ingress_acted, session.peer.incarnation)

        cluster.router.on_broken = on_broken

    def incarnation(self, name: str) -> str:
        member = self.cluster.workers[name].member
        assert member is not None
        return member.incarnation

    def freeze(self, name: str) -> float:
        """When."""
        frozen_at = time.monotonic()
        self.cluster.workers[name].signal(signal.SIGSTOP)
        return frozen_at

    def kill(self, name: str) -> float:
        """When."""
        pid = self.cluster.workers[name].process.pid
        assert pid is not None
        pidfd = os.pidfd_open(pid)
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self._ends.append(asyncio.ensure_future(asyncio.to_thread(_see_end, pidfd, killed_at)))
        return killed_at

    async def ended_s(self) -> list[float]:
        """Of every process killed: from the signal until it was gone."""
        return await asyncio.gather(*self._ends)

    async def at_ingress(self, incarnation: str) -> float:
        async with asyncio.timeout(NOTICED_S):
            return await self._at_ingress.setdefault(incarnation, asyncio.get_running_loop().create_future())

    async def at_worker(self, name: str, incarnation: str, since: float) -> float:
        return await asyncio.to_thread(_told, self.cluster.workers[name].pipe, incarnation, since)

    async def at_decode(self, incarnation: str, since: float) -> list[float]:
        names = [name for name, worker in self.cluster.workers.items() if worker.pool == "decode"]
        return await asyncio.gather(*(self.at_worker(name, incarnation, since) for name in names))

    def _ingress_acted(self, incarnation: str) -> None:
        noticed = self._at_ingress.setdefault(incarnation, asyncio.get_running_loop().create_future())
        if not noticed.done():
            noticed.set_result(time.monotonic())

    def forget(self, incarnation: str) -> None:
        """It is back, and may go again."""
        self._at_ingress.pop(incarnation, None)


def _see_end(pidfd: int, killed_at: float) -> float:
    return ended_at(pidfd, NOTICED_S) - killed_at


def _told(pipe: Connection, incarnation: str, since: float) -> float:
    """Workers dial each other, so that two sessions break: what is left from the time before is no notice."""
    deadline = time.monotonic() + NOTICED_S
    while pipe.poll(max(0.0, deadline - time.monotonic())):
        whose, at = pipe.recv()
        if whose == incarnation and at >= since:
            return at
    raise TimeoutError(f"nobody noticed within {NOTICED_S:g} s")


# ---------------------------------------------------------------- what happens


async def kill_prefill(watched: Watched, number: int) -> list[float]:
    name = f"prefill-{number % 2}"
    incarnation = watched.incarnation(name)
    killed_at = watched.kill(name)
    noticed = await watched.at_decode(incarnation, killed_at)
    await _succeed(watched, name)
    return [at - killed_at for at in noticed]


async def kill_decode(watched: Watched, number: int) -> list[float]:
    name = f"decode-{number % 2}"
    incarnation = watched.incarnation(name)
    killed_at = watched.kill(name)
    noticed = await watched.at_ingress(incarnation)
    await _succeed(watched, name)
    return [noticed - killed_at]


async def freeze_prefill(watched: Watched, number: int) -> list[float]:
    name = f"prefill-{number % 2}"
    incarnation = watched.incarnation(name)
    frozen_at = watched.freeze(name)
    noticed = [*await watched.at_decode(incarnation, frozen_at), await watched.at_ingress(incarnation)]
    await _succeed(watched, name)
    return [at - frozen_at for at in noticed]


async def unplug_prefill(host: Host, watched: Watched, number: int) -> list[float]:
    """`number` says nothing: it is always prefill-0 that lives on `host`."""
    del number
    incarnation = watched.incarnation("prefill-0")
    cut_at = time.monotonic()
    host.unplug()
    noticed = [*await watched.at_decode(incarnation, cut_at), await watched.at_ingress(incarnation)]
    host.plug()
    await watched.cluster.until_warm()
    watched.forget(incarnation)
    return [at - cut_at for at in noticed]


async def _succeed(watched: Watched, name: str) -> None:
    await watched.cluster.kill(name)  # a frozen one dies, too
    await watched.cluster.replace(name)


# ---------------------------------------------------------------- the load


@asynccontextmanager
async def load(cluster: PlainCluster) -> AsyncIterator[None]:
    """Streams without pause."""
    clients = [asyncio.create_task(_client(cluster, number)) for number in range(NUM_STREAMS)]
    try:
        yield
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def _client(cluster: PlainCluster, number: int) -> None:
    sampling = SamplingParams(max_tokens=64, ignore_eos=True)
    prompt = [1 + (number + position) % 500 for position in range(PROMPT_TOKENS)]
    while True:
        prompt[0] = 1 + prompt[0] % 500  # no prefix hits
        with suppress(SluiceError):  # two of its workers died: given up
            await cluster.ask(prompt, sampling)


# ---------------------------------------------------------------- all of it


def _settings(directory: Path) -> dict[str, object]:
    return {
        "model.path": str(checkpoint.write(directory, checkpoint.TINY)),
        "model.load_format": "dummy",
        "kv.block_size": 16,
        "kv.num_blocks": 512,
        "log.level": "error",
    }


async def measure_scenes(
    scenes: Mapping[str, tuple[Scene, int]], main: WorkerMain, *, loaded: bool
) -> dict[str, list[float]]:
    """Each scene as often as its number says, one after the other, in one cluster."""
    noticed: dict[str, list[float]] = {what: [] for what in scenes}
    with tempfile.TemporaryDirectory() as directory:
        async with plain_cluster(_settings(Path(directory)), prefill=2, decode=2, main=main) as cluster:
            watched = Watched(cluster)
            async with load(cluster) if loaded else nullcontext():
                for what, (scene, count) in scenes.items():
                    for number in range(count):
                        noticed[what] += await scene(watched, number)
                    progress(f"failures: {what}, {LOADS[loaded]}: done")
            if ended_s := await watched.ended_s():
                noticed["process ended"] = ended_s
    return noticed


def measure(num_kills: int, num_silences: int, *, loaded: bool) -> dict[str, list[float]]:
    """Seconds by what happened. Without root or iproute2 nothing is cut."""
    scenes: dict[str, tuple[Scene, int]] = {
        "prefill killed": (kill_prefill, num_kills),
        "decode killed": (kill_decode, num_kills),
        "frozen": (freeze_prefill, num_silences),
    }
    noticed = asyncio.run(measure_scenes(scenes, serve, loaded=loaded))
    if os.geteuid() != 0 or shutil.which("ip") is None:
        progress("failures: no link is cut: that needs root and iproute2")
        return noticed
    with hosts(2) as (lonely, other):
        names = ("prefill-0", "prefill-1", "decode-0", "decode-1")
        main = serve_on({name: lonely if name == "prefill-0" else other for name in names}, serve)
        cut: dict[str, tuple[Scene, int]] = {"cut": (partial(unplug_prefill, lonely), num_silences)}
        return noticed | asyncio.run(measure_scenes(cut, main, loaded=loaded))


def figures(noticed: Mapping[str, list[float]], *, loaded: bool) -> list[Figure]:
    made: list[Figure] = []
    for what, seconds in noticed.items():
        silent, noted = what in ("frozen", "cut"), what != "process ended"
        bound_s = SILENT_S if silent else KILLED_LOADED_S if loaded else KILLED_S
        note = f"{len(seconds)} times noticed; bound: the design's" if noted else "after SIGKILL, by the kernel"
        for name, share in (("p50", 0.5), ("worst" if silent else "p99", 0.99)):
            made.append(
                Figure(
                    f"{what}, {LOADS[loaded]}, {name}",
                    1e3 * percentile(seconds, share),
                    "ms",
                    1e3 * bound_s if noted and name != "p50" else None,
                    less_is_better=True,
                    note=note,
                )
            )
    return made


def run_all(num_kills: int, num_silences: int) -> Report:
    setting = Setting.here()
    made: list[Figure] = []
    details: dict[str, object] = {}
    for loaded in (False, True):
        psutil.cpu_percent()
        noticed = measure(num_kills, num_silences, loaded=loaded)
        made += figures(noticed, loaded=loaded)
        details[LOADS[loaded]] = {"seconds": noticed, "cpu_percent": psutil.cpu_percent()}
    what = "from a worker's end or silence to the survivors acting on it; bounds: the design's"
    return Report("failures", what, {"kills": num_kills, "silences": num_silences}, made, setting, details)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="of each role, idle and loaded each")
    parser.add_argument("--silences", type=int, default=5, help="of each kind, idle and loaded each")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    publish(run_all(options.kills, options.silences), options.json)


if __name__ == "__main__":
    main()

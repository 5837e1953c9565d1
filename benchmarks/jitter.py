"""Step jitter: what 64 open streams cost the engine that feeds them. Run it with `python -m benchmarks.engine`.

One worker process decodes 64 sequences; the router that reads them lives in the process of the benchmark. The same
engine, with the same sequences, also steps alone in a process without sessions, before and after; the quieter of the
two runs is the bound. Counted are the steps in which every sequence got a token:

  step    from the end of one step to the end of the next, as the engine thread sees it
  gap     from one token of a stream to its next, as the reader sees it
  lost    share of a served step's time that the lone engine does not need: what words and bytes cost, through the
          loop around the step and through sharing the interpreter inside it
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from uuid import uuid4

from benchmarks import checkpoint
from benchmarks.lone_engine import lone_engine
from benchmarks.process import ANSWER_S, process, receive
from benchmarks.report import Figure, percentile, progress
from cluster import config_file
from cluster.config import SluiceConfig
from cluster.log import Log
from cluster.membership import Membership
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey, SamplingParams
from cluster.words_thread import WordsThread
from router.flight import RouterRequest
from router.router import Router

SECRET = b"benchmark"
_POOL = "mixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    num_streams: int = 64
    num_steps: int = 200
    prompt_tokens: int = 32
    shape: checkpoint.Shape = checkpoint.SMALL

    def prompts(self) -> list[list[int]]:
        draw = random.Random(0)
        vocab = self.shape.vocab_size
        return [[draw.randrange(vocab) for _ in range(self.prompt_tokens)] for _ in range(self.num_streams)]

    def sampling(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.num_steps, ignore_eos=True)

    def config(self, directory: Path) -> SluiceConfig:
        settings = {
            "model.path": str(checkpoint.write(directory, self.shape)),
            "model.load_format": "dummy",
            "kv.block_size": 64,
            "kv.num_blocks": self.num_streams * (1 + -(-(self.prompt_tokens + self.num_steps) // 64)),
            "scheduler.max_sequences": self.num_streams,
            "pools": {_POOL: {"workers": 1, "roles": ["prefill", "decode"], "threads": 1}},
            "router.local_prefill": "always",
            "log.level": "warning",
        }
        return config_file.load(None, settings=settings)


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of time.perf_counter, which processes of one machine share."""

    start: float
    end: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Steady:
    """The steps that gave every sequence a token."""

    intervals: list[float]  # from the end of one to the end of the next
    durations: list[float]  # of those steps themselves

    @classmethod
    def of(cls, steps: list[Step], num_streams: int) -> Steady:
        pairs = [
            (before, step) for before, step in pairwise(steps) if before.num_tokens == step.num_tokens == num_streams
        ]
        return cls([step.end - before.end for before, step in pairs], [step.end - step.start for _, step in pairs])

    @property
    def mean(self) -> float:
        return sum(self.intervals) / len(self.intervals)


@dataclass(frozen=True, slots=True)
class Measured:
    load: Load
    alone: Steady
    served: Steady
    gaps: list[float]  # at the readers, once every stream had begun


def measure(load: Load) -> Measured:
    with tempfile.TemporaryDirectory() as directory:
        config = load.config(Path(directory))
        first = _alone(config, load)
        steps, arrivals = _served(config, load)
        second = _alone(config, load)
    progress("engine: jitter done")
    return Measured(
        load=load,
        alone=min(first, second, key=lambda steady: percentile(steady.intervals, 0.5)),
        served=Steady.of(steps, load.num_streams),
        gaps=_gaps(arrivals),
    )


def _gaps(arrivals: list[list[float]]) -> list[float]:
    start = max(times[0] for times in arrivals)
    return [after - before for times in arrivals for before, after in pairwise(times) if start <= before]


# ---------------------------------------------------------------- without sessions


def _alone(config: SluiceConfig, load: Load) -> Steady:
    with process(_step_alone, config, load) as pipe:
        return Steady.of(receive(pipe), load.num_streams)


def _step_alone(pipe: Connection, config: SluiceConfig, load: Load) -> None:
    """In a process of its own: the parts of a worker, but neither sessions nor any thread beside the engine's."""
    from workers.engine.sequence import Sequence

    steps = _time_steps()
    parts = lone_engine(config, _POOL)
    for i, prompt in enumerate(load.prompts()):
        parts.scheduler.add(Sequence(i, RequestKey(str(i), 0), prompt, len(prompt), load.sampling(), arrival=i))
    while parts.engine.has_work:
        parts.engine.step()
    pipe.send(steps)


def _time_steps() -> list[Step]:
    """Has engines that this process assembles from now on keep when they stepped; where that is kept."""
    from workers import assembly
    from workers.engine.engine import Engine
    from workers.engine.step_plan import StepOutcome

    steps: list[Step] = []

    class TimedEngine(Engine):
        def step(self) -> StepOutcome | None:
            start = time.perf_counter()
            outcome = super().step()
            if outcome is not None:
                steps.append(Step(start, time.perf_counter(), len(outcome.tokens)))
            return outcome

    setattr(assembly, "Engine", TimedEngine)  # noqa: B010
    return steps


# ---------------------------------------------------------------- with a stream for each sequence


def _served(config: SluiceConfig, load: Load) -> tuple[list[Step], list[list[float]]]:
    with process(_work, config) as pipe:
        members = Membership.from_wire(receive(pipe))
        arrivals = asyncio.run(_read(config, load, members))
        pipe.send("steps")
        return receive(pipe), arrivals


def _work(pipe: Connection, config: SluiceConfig) -> None:
    """In a process of its own: a whole worker."""
    from workers import standalone

    steps = _time_steps()
    worker = standalone.make_worker(config, _POOL, "worker", SECRET)
    members = Membership(1, (worker.start(),))
    worker.update_members(members)
    pipe.send(members.to_wire())
    pipe.recv()
    pipe.send(steps)
    worker.stop()


async def _read(config: SluiceConfig, load: Load, members: Membership) -> list[list[float]]:
    """When each token of each stream arrived."""
    with WordsThread(config=config.words) as words:
        router = Router(
            config.router,
            config.limits,
            words,
            pb.Identity(kind=pb.INGRESS, name="reader", incarnation=uuid4().hex),
            SECRET,
            Metrics(),
            Log.open("router", config.log),
            block_size=config.kv.block_size,
        )
        await router.start()
        router.update_membership(members)
        try:
            async with asyncio.timeout(ANSWER_S):
                while not router.ready():
                    await asyncio.sleep(0.01)
                return await asyncio.gather(*(_stream(router, p, load.sampling()) for p in load.prompts()))
        finally:
            await router.stop()


async def _stream(router: Router, prompt: list[int], sampling: SamplingParams) -> list[float]:
    request = RouterRequest(request_id=uuid4().hex, prompt_token_ids=tuple(prompt), sampling=sampling)
    times: list[float] = []
    async for delta in router.generate(request):
        times += [time.perf_counter()] * len(delta.token_ids)
    return times


# ---------------------------------------------------------------- figures


def figures(measured: Measured) -> list[Figure]:
    alone, served, streams = measured.alone, measured.served, measured.load.num_streams
    lone, step, gap = (_quantiles(values) for values in (alone.intervals, served.intervals, measured.gaps))
    with_streams = f"step with {streams} streams"
    rows = [Figure(f"step of the engine alone, {name}", lone[name], "ms") for name in lone]
    rows += [Figure(f"{with_streams}, {name}", step[name], "ms", lone[name], True, "bound: alone") for name in step]
    rows += [
        Figure(f"gap at the reader, {name}", gap[name], "ms", step[name], True, f"bound: {with_streams}")
        for name in gap
    ]
    outside = [1 - inside / whole for inside, whole in zip(served.durations, served.intervals, strict=True)]
    lost = f"of the median step, {100 * percentile(outside, 0.5):.1f} % between two steps"
    counts = f"mean of {len(served.intervals)} steps; bound: alone"
    return [
        *rows,
        Figure("lost to words and bytes", 100 * (1 - lone["p50"] / step["p50"]), "%", note=lost),
        Figure("tokens streamed", streams / served.mean, "tok/s", streams / alone.mean, note=counts),
    ]


def _quantiles(seconds: list[float]) -> dict[str, float]:
    """In ms."""
    return {name: 1e3 * percentile(seconds, share) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def details(measured: Measured) -> dict[str, object]:
    """In seconds."""
    return {
        "load": asdict(measured.load),
        "model": str(measured.load.shape),
        "alone_intervals_s": measured.alone.intervals,
        "served_intervals_s": measured.served.intervals,
        "served_durations_s": measured.served.durations,
    }

"""What HTTP, router and words add to the time to the first token of an engine that has nothing else to do.

    python -m benchmarks.overhead [--requests 200] [--prompt 64 256] [--disaggregated] [--tiny] [--json FILE]

One request after the other, each prompt a new one, each sent three ways, in turns that rotate:

  engine    an engine in a process of its own: from adding the prompt's token ids to its first token
  replica   text over HTTP to the port of the ingress replica itself
  public    text over HTTP to the public port: HAProxy, Ray Serve, FastAPI, tokenizer, router, words, worker

Replica and public are one app on a Ray cluster of its own, with one worker that does both stages (--disaggregated: one
for each), of the same model and with as many threads as the lone engine. Engine and public get the same prompt; the
replica's is another one of as many tokens, as public's would be cached there. Nothing is cached anywhere, which is
checked. HTTP clients count from before they connect; every request has a connection of its own.

The figure is median(public) - median(engine), and so for the 90th percentile. Its parts are medians of differences
within one request: HAProxy (public - replica), HTTP in the replica (client - server's own time to the first token),
the tokenizer (the replica's class, here), and the rest: router, words and the worker's loop. Of that, some passes
in the worker that computes the prompt, from when it was asked to the end of its step, beyond what the engine takes.
--tiny serves a model that computes next to nothing, so that the rest is nearly all there is.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from benchmarks import checkpoint
from benchmarks.arrivals import Arrival
from benchmarks.client import Endpoint, Sample, ask
from benchmarks.lone_engine import first_tokens
from benchmarks.neighbours import Neighbours
from benchmarks.process import process, receive
from benchmarks.report import Figure, Report, Setting, percentile, publish
from benchmarks.started_cluster import started_cluster
from benchmarks.vocabulary import Vocabulary, write_tokenizer
from cluster import config_file
from cluster.config import SluiceConfig
from deploy.tokenizer import Tokenizer

BOUND_MS = 10.0
WAYS = ("engine", "replica", "public")
_POOL = "mixed"
_MODEL = "benchmark"
_REPLICA_OFFSETS = range(6, 51)  # from the public port, in the window that deploy.local_cluster.PortWindow draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    num_requests: int = 200  # each way
    num_warmup: int = 20  # before them
    prompt_tokens: tuple[int, int] = (64, 256)
    num_tokens: int = 4  # of an answer
    seed: int = 0
    shape: checkpoint.Shape = checkpoint.SMALL
    disaggregated: bool = False

    @property
    def pool(self) -> str:
        """Whose engine the lone one is like."""
        return "prefill" if self.disaggregated else _POOL

    def config(self, directory: Path) -> SluiceConfig:
        pools = {_POOL: {"workers": 1, "roles": ["prefill", "decode"], "threads": 1}}
        if self.disaggregated:
            pools = {role: {"workers": 1, "threads": 1} for role in ("prefill", "decode")}
        settings = {
            "model.path": str(directory),
            "model.load_format": "dummy",
            "model.served_name": _MODEL,
            "kv.memory_bytes": 256 << 20,
            "pools": pools,
            "router.local_prefill": "never" if self.disaggregated else "always",
            "http.port": 0,
            "log.level": "warning",
        }
        return config_file.load(None, settings=settings)

    def rounds(self, vocabulary: Vocabulary) -> list[tuple[Arrival, Arrival]]:
        """Two different prompts of one length each, warm-up first: for engine and public, and for the replica."""
        draw = random.Random(self.seed)
        words = list(vocabulary.words)
        found: list[tuple[Arrival, Arrival]] = []
        for _ in range(self.num_warmup + self.num_requests):
            length = draw.randint(*self.prompt_tokens)
            one, other = ([draw.choice(words) for _ in range(length)] for _ in range(2))
            found.append(
                (
                    Arrival(0.0, one, self.num_tokens, vocabulary.text(one)),
                    Arrival(0.0, other, self.num_tokens, vocabulary.text(other)),
                )
            )
        return found


@dataclass(frozen=True, slots=True)
class Round:
    """One prompt length, seconds."""

    engine: float
    replica: float
    public: float
    replica_server: float  # to the first token as the replica counts it, of the request at its own port
    public_server: float  # of the one through the public port
    public_computed: float  # of that, in the worker that computed the prompt
    tokenize: float


# ---------------------------------------------------------------- the three ways


class Ways:
    """Belongs to one event loop. Each way raises RuntimeError when it fails, or finds any of the prompt cached."""

    def __init__(self, engine: Connection, public: str, replica: str, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._urls = {"public": public, "replica": replica}
        self._tokenizer = tokenizer

    async def measure(self, number: int, one: Arrival, other: Arrival) -> Round:
        """The order rotates with `number`."""
        first = number % len(WAYS)
        seconds: dict[str, float] = {}
        for way in WAYS[first:] + WAYS[:first]:
            if way == "engine":
                seconds[way] = self._lone(one)
            else:
                sample = await self._over_http(way, one if way == "public" else other)
                seconds[way] = sample.token_s[0]
                seconds[f"{way}_server"] = sample.server_ttft_s
                if way == "public":
                    seconds["public_computed"] = sample.computed_s
        start = time.perf_counter()
        token_ids = await self._tokenizer.encode(one.text)
        tokenize = time.perf_counter() - start
        if token_ids != one.prompt:
            raise RuntimeError(f"a text of {len(one.prompt)} words is {len(token_ids)} tokens, not the ones drawn")
        return Round(**seconds, tokenize=tokenize)

    def _lone(self, arrival: Arrival) -> float:
        self._engine.send((arrival.prompt, arrival.num_tokens))
        first, hit_tokens = receive(self._engine)
        _check_cold("engine", hit_tokens)
        return first

    async def _over_http(self, way: str, arrival: Arrival) -> Sample:
        sample = Sample(0.0, len(arrival.prompt), arrival.num_tokens)
        await ask(Endpoint(self._urls[way], _MODEL), arrival, time.perf_counter(), sample)
        if not sample.complete:
            raise RuntimeError(f"{way}: {sample.error or 'too few tokens'}")
        _check_cold(way, sample.hit_tokens)
        return sample


def _check_cold(way: str, hit_tokens: int) -> None:
    if hit_tokens:
        raise RuntimeError(f"{way}: {hit_tokens} tokens of a new prompt were cached; the comparison would be unfair")


async def measure_all(ways: Ways, rounds: Sequence[tuple[Arrival, Arrival]], num_warmup: int) -> list[Round]:
    measured = [await ways.measure(number, *pair) for number, pair in enumerate(rounds)]
    return measured[num_warmup:]


def replica_url(public: str) -> str:
    """Where the app's only ingress replica listens itself, behind HAProxy. Raises RuntimeError."""
    address = urlsplit(public)
    assert address.port is not None
    ports = [address.port + offset for offset in _REPLICA_OFFSETS]
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        for port in ports:
            try:
                if client.get(f"http://{address.hostname}:{port}/health").status_code == 200:
                    return f"http://{address.hostname}:{port}"
            except httpx.HTTPError:
                continue
    raise RuntimeError(f"no ingress replica listens on the ports {ports[0]} to {ports[-1]}")


@contextmanager
def all_ways(plan: Plan) -> Iterator[tuple[Ways, Vocabulary]]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        checkpoint.write(directory, plan.shape)
        write_tokenizer(directory, plan.shape.vocab_size)
        tokenizer = Tokenizer.load(directory)
        assert tokenizer is not None
        config = plan.config(directory)
        with process(first_tokens, config, plan.pool) as engine:
            assert receive(engine) == "ready"
            with started_cluster(config, "overhead") as url:
                yield Ways(engine, url, replica_url(url), tokenizer), Vocabulary.read(directory)
            engine.send(None)
        tokenizer.close()


# ---------------------------------------------------------------- the report


def figures(rounds: Sequence[Round]) -> list[Figure]:
    """In ms. The bound of what is added is the target, that of each way the lone engine."""
    by_way = {
        "engine": [one.engine for one in rounds],
        "replica": [one.replica for one in rounds],
        "public": [one.public for one in rounds],
    }
    rows: list[Figure] = []
    for share, name in ((0.5, "p50"), (0.9, "p90")):
        engine, replica, public = (1e3 * percentile(by_way[way], share) for way in WAYS)
        rows += [
            Figure(f"added TTFT, {name}", public - engine, "ms", BOUND_MS, True, "bound: the target"),
            Figure(f"TTFT of the lone engine, {name}", engine, "ms"),
            Figure(f"TTFT at the replica's port, {name}", replica, "ms", engine, True),
            Figure(f"TTFT at the public port, {name}", public, "ms", engine, True),
        ]
    paired = {
        "added within a request": [one.public - one.engine for one in rounds],
        "HAProxy": [one.public - one.replica for one in rounds],
        "HTTP in the replica": [one.replica - one.replica_server for one in rounds],
        "tokenizer": [one.tokenize for one in rounds],
        "router, words, the worker's loop": [one.public_server - one.tokenize - one.engine for one in rounds],
        "of that, in the worker that computes": [one.public_computed - one.engine for one in rounds],
    }
    rows += [Figure(f"{name}, median", 1e3 * percentile(seconds, 0.5), "ms") for name, seconds in paired.items()]
    return rows


def run(plan: Plan) -> Report:
    setting = Setting.here()
    with all_ways(plan) as (ways, vocabulary):
        others = Neighbours()
        rounds = asyncio.run(measure_all(ways, plan.rounds(vocabulary), plan.num_warmup))
        neighbours = others.num_cores()
    low, high = plan.prompt_tokens
    return Report(
        benchmark="overhead",
        what=(
            f"TTFT over HTTP beside an engine in process; {plan.shape}, "
            f"{'two workers' if plan.disaggregated else 'one worker'} of one thread; {plan.num_requests} "
            f"requests one by one, prompts {low}-{high} tokens; others kept {neighbours:.1f} cores busy"
        ),
        arguments=asdict(plan),
        figures=figures(rounds),
        setting=setting,
        details={"neighbours": neighbours, "rounds_s": [asdict(one) for one in rounds]},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plan = Plan()
    parser.add_argument("--requests", type=int, default=plan.num_requests, help="each way")
    parser.add_argument("--warmup", type=int, default=plan.num_warmup, help="requests before them, not counted")
    parser.add_argument("--prompt", type=int, nargs=2, default=plan.prompt_tokens, metavar=("LOW", "HIGH"))
    parser.add_argument("--seed", type=int, default=plan.seed)
    parser.add_argument("--disaggregated", action="store_true", help="a prefill worker and a decode worker")
    parser.add_argument("--tiny", action="store_true", help="a model that computes next to nothing")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    plan = Plan(
        num_requests=options.requests,
        num_warmup=options.warmup,
        prompt_tokens=tuple(options.prompt),
        seed=options.seed,
        shape=checkpoint.TINY if options.tiny else plan.shape,
        disaggregated=options.disaggregated,
    )
    publish(run(plan), options.json)


if __name__ == "__main__":
    main()

"""One router's decisions and block events, on one core, without sessions: the code that a replica runs in between.

    python -m benchmarks.router [--blocks 4000000] [--decisions 2000] [--batch 64] [--json FILE]

32 prefill and 32 decode workers, every pair warm. The prefix index is filled through the feed, batch by batch, and
grows as it goes; then as much is evicted as stored. A decision is what happens between a request and its Submit: hits
of 128 blocks in the index and among the predicted, the costs of all 1024 pairs, the choice, and the
predictions that it leaves behind. Prompts have 8192 tokens in blocks of 64; cold ones are known nowhere, warm ones with
part of their blocks on a few workers of each stage. The hash chain is timed apart: it is computed once per request,
whoever routes. Decisions a second are counted in the time that this process computes, so that neighbours on the core
do not count; that of the clock is noted beside it. Decisions come in bursts of 100; after every eighth one a worker
reports its load and its rates, which is what 64 workers do ten times a second at 5,000 decisions a second.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple
from uuid import uuid4

import psutil

from benchmarks.report import Figure, Report, Setting, percentile, progress, publish
from cluster.config import LogConfig, Role, RouterConfig
from cluster.hashing import HASH_BYTES, chain_root
from cluster.log import Log
from cluster.membership import Member, Membership, MemberState, Rank
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import SamplingParams
from cluster.session import Session
from router.fleet import Fleet
from router.flight import Flight, RouterRequest
from router.navigator import Navigator
from router.plan import Plan

NUM_WORKERS = 32  # of each stage
PROMPT_TOKENS = 8192
BLOCK_SIZE = 64
NUM_BLOCKS = PROMPT_TOKENS // BLOCK_SIZE
MIN_DECISIONS_PER_S = 5000.0
MIN_EVENTS_PER_S = 200_000.0
MAX_P99_MS = 1.0
BURST = 100
DECISIONS_PER_REPORT = 8
COMPATIBILITY = b"c" * 16


class Line(Session):
    """A session to nobody: what is sent is dropped."""

    def __init__(self, member: Member) -> None:
        self.peer = pb.Identity(kind=pb.WORKER, name=member.name, incarnation=member.incarnation)
        self.id = member.name

    def send(self, frame: pb.Frame, key: object = None) -> None:
        """Nobody listens."""


@dataclass(slots=True)
class Source:
    """The events of one worker."""

    line: Line
    last_id: int = 0

    def events(self, stored: bytes, removed: bytes = b"") -> bytes:
        self.last_id += 1
        return pb.BlockEvents(id=self.last_id, stored=stored, removed=removed).SerializeToString()


class Decided(NamedTuple):
    seconds: list[float]  # of each decision, by the clock
    computed_s: float  # by all of them, of this process
    chains: list[float]  # seconds of each hash chain
    hits: list[int]  # blocks that the chosen source need not compute


class Bench:
    def __init__(self, batch: int, seed: int) -> None:
        self.batch = batch
        self.random = Random(seed)
        self.fleet = Fleet()
        self.waiting: list[object] = []
        config = RouterConfig(policy="kv_aware")
        log = Log.open("router", LogConfig(level="error"))
        self.navigator = Navigator(config, self.fleet, Metrics(), log, self.waiting.append, block_size=BLOCK_SIZE)
        members = [
            Member(
                name=f"{role}-{index}",
                pool=role.value,
                incarnation=uuid4().hex,
                address=f"127.0.0.1:{index + 1}",
                roles=(role,),
                ranks=(Rank(rank=0),),
                compatibility_hash=COMPATIBILITY,
                state=MemberState.READY,
            )
            for role in (Role.PREFILL, Role.DECODE)
            for index in range(NUM_WORKERS)
        ]
        self.fleet.update(Membership(1, tuple(members)))
        self.sources = [Source(Line(member)) for member in members]
        for source, member in zip(self.sources, members, strict=True):
            self.fleet.opened(source.line)
            self.navigator.feed.opened(source.line, member, 0.0)
            self.navigator.feed.heard(source.line, pb.BlockEvents(dump=True), 0.0)
            self.report(source)

    def report(self, source: Source) -> None:
        prefills = [each.line.peer.incarnation for each in self.sources[:NUM_WORKERS]]
        random = self.random
        report = pb.LoadReport(
            num_running=random.randrange(32),
            queued_prefill_tokens=random.randrange(16384),
            block_bytes=4 << 20,
            prefill_tokens_per_s=20_000.0,
            last_event_id=source.last_id,
            groups=[pb.GroupLoad(name="self", num_blocks=62_500, free=1000, cached=40_000)],
        )
        if source in self.sources[NUM_WORKERS:]:
            report.pairs.extend(
                pb.PairReport(source_incarnation=name, warm=True, bytes_per_s=5e10 + random.randrange(100))
                for name in prefills
            )
        self.fleet.reported(source.line, report)
        self.navigator.feed.reported(source.line, report, 0.0)

    def hear(self, source: Source, payload: bytes) -> None:
        """As the router's loop does with a message of the Bulk stream."""
        self.navigator.feed.heard(source.line, pb.BlockEvents.FromString(payload), 0.0)
        assert not self.waiting, "a batch of more than a slice"

    def fill(self, num_blocks: int) -> tuple[float, list[float]]:
        """Events per second while the index grows, and the seconds of each batch."""
        seconds: list[float] = []
        for number in range(num_blocks // self.batch):
            source = self.sources[number % len(self.sources)]
            payload = source.events(self.random.randbytes(16 * self.batch))
            seconds.append(self._timed(source, payload))
        return self.batch * len(seconds) / sum(seconds), seconds

    def churn(self, num_batches: int) -> float:
        """Events per second where each worker stores and evicts alike."""
        recent: dict[int, list[bytes]] = {}
        seconds, num_events = 0.0, 0
        for number in range(num_batches):
            index = number % len(self.sources)
            kept = recent.setdefault(index, [])
            stored = self.random.randbytes(16 * (self.batch // 2))
            removed = kept.pop(0) if len(kept) > 8 else b""
            kept.append(stored)
            num_events += (len(stored) + len(removed)) // 16
            seconds += self._timed(self.sources[index], self.sources[index].events(stored, removed))
        return num_events / seconds

    def _timed(self, source: Source, payload: bytes) -> float:
        started = time.perf_counter()
        self.hear(source, payload)
        return time.perf_counter() - started

    # ------------------------------------------------------------ decisions

    def flight(self, tokens: Sequence[int]) -> tuple[Flight, float]:
        """A request with its hash chain, and the seconds that this took."""
        flight = Flight(
            RouterRequest(
                request_id=uuid4().hex, prompt_token_ids=tuple(tokens), sampling=SamplingParams(max_tokens=16)
            )
        )
        started = time.perf_counter()
        flight.hashes(chain_root(COMPATIBILITY), BLOCK_SIZE)
        return flight, time.perf_counter() - started

    def prompt(self) -> list[int]:
        return [self.random.getrandbits(17) for _ in range(PROMPT_TOKENS)]

    def warm_prompts(self, count: int) -> list[list[int]]:
        """Each known in part on two prefill workers and on one decode worker."""
        prompts = [self.prompt() for _ in range(count)]
        for prompt in prompts:
            flight, _ = self.flight(prompt)
            hashes = flight.hashes(chain_root(COMPATIBILITY), BLOCK_SIZE)
            holders = [*self.random.sample(range(NUM_WORKERS), 2), NUM_WORKERS + self.random.randrange(NUM_WORKERS)]
            for index in holders:
                known = hashes[: HASH_BYTES * self.random.randrange(1, NUM_BLOCKS + 1)]
                self.hear(self.sources[index], self.sources[index].events(known))
        return prompts

    def decide(self, prompts: Iterator[Sequence[int]]) -> Decided:
        decisions: list[float] = []
        chains: list[float] = []
        hits: list[int] = []
        computed_s = 0.0
        now = 0.0
        while waiting := [self.flight(prompt) for prompt in islice(prompts, BURST)]:
            for number, (flight, chain) in enumerate(waiting):
                if number % DECISIONS_PER_REPORT == 0:
                    self.report(self.random.choice(self.sources))
                now += 1 / MIN_DECISIONS_PER_S
                started, started_cpu = time.perf_counter(), time.process_time()
                plan = self.navigator.plan(flight, now)
                assert isinstance(plan, Plan)
                self.navigator.placed(flight, plan, now, led=False)
                computed_s += time.process_time() - started_cpu
                decisions.append(time.perf_counter() - started)
                chains.append(chain)
                assert plan.choice is not None
                hits.append(plan.choice.num_prefill_hits)
        return Decided(decisions, computed_s, chains, hits)


def measure(num_blocks: int, num_decisions: int, batch: int) -> tuple[list[Figure], dict[str, object]]:
    bench = Bench(batch, seed=0)
    before = psutil.Process().memory_info().rss
    progress("filling …")
    filled_per_s, batches = bench.fill(num_blocks)
    churned_per_s = bench.churn(max(64, num_decisions * 2))
    index = bench.navigator.feed.index
    committed = psutil.Process().memory_info().rss - before
    progress("deciding …")
    num_warm = min(500, num_decisions)
    warm = bench.warm_prompts(num_warm)
    kinds = {
        "cold": (bench.prompt() for _ in range(num_decisions)),
        "warm": (bench.random.choice(warm) for _ in range(num_decisions)),
    }
    figures = [
        Figure("events/s, filling", filled_per_s, "/s", MIN_EVENTS_PER_S, note=f"batches of {batch}; bound: target"),
        Figure("events/s, steady", churned_per_s, "/s", MIN_EVENTS_PER_S, note="half stored, half removed"),
        Figure("batch p99", 1e6 * percentile(batches, 0.99), "µs", note="while the index grows"),
        Figure("longest batch", 1e3 * max(batches), "ms", note="frees a table that was left"),
        Figure("bytes/block", index.num_bytes / index.num_blocks, "B", note=f"{index.num_blocks} blocks"),
        Figure("committed bytes/block", committed / index.num_blocks, "B", note="of the process, all else included"),
    ]
    chains: list[float] = []
    for kind, prompts in kinds.items():
        decided = bench.decide(prompts)
        decisions = decided.seconds
        chains += decided.chains
        by_clock = f"by the clock {len(decisions) / sum(decisions):.0f}"
        share = sum(decided.hits) / len(decisions) / NUM_BLOCKS
        figures += [
            Figure(
                f"decisions/s, {kind}",
                len(decisions) / decided.computed_s,
                "/s",
                MIN_DECISIONS_PER_S,
                note=f"{by_clock}; {share:.0%} of the blocks hit; bound: target",
            ),
            Figure(
                f"decision p99, {kind}",
                1e3 * percentile(decisions, 0.99),
                "ms",
                MAX_P99_MS,
                less_is_better=True,
                note=f"median {1e3 * percentile(decisions, 0.5):.3f}; bound: target",
            ),
        ]
    figures.append(Figure("hash chain", 1e3 * percentile(chains, 0.5), "ms", note="of 8192 tokens, median"))
    return figures, {"num_seats": index.num_seats, "num_ways": NUM_WORKERS * NUM_WORKERS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4_000_000)
    parser.add_argument("--decisions", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    setting = Setting.here()
    figures, details = measure(options.blocks, options.decisions, options.batch)
    arguments = {"blocks": options.blocks, "decisions": options.decisions, "batch": options.batch}
    what = "decisions and block events of one router on one core"
    publish(Report("router", what, arguments, figures, setting, details), options.json)


if __name__ == "__main__":
    main()

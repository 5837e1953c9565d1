"""What the tests that kill and freeze share: a cluster with quick heartbeats, prompts with known answers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from random import Random
from typing import TypeVar
from uuid import uuid4

import torch

from cluster.membership import Member
from cluster.protos import worker_pb2 as pb
from cluster.request import SamplingParams
from router.flight import RouterRequest, TokenDelta
from tests.support.checkpoints import VOCAB_SIZE, checkpoint, transformers_model
from tests.support.plain_cluster import Answer, PlainCluster, WorkerMain, running_cluster, serve
from tests.support.watch import Watch

T = TypeVar("T")
FAMILY = "llama"
BLOCK_SIZE = 16
CHUNK = 32
SETTINGS: Mapping[str, object] = {
    "kv.block_size": BLOCK_SIZE,
    "kv.num_blocks": 192,
    "scheduler.max_batched_tokens": 64,
    "scheduler.chunk_tokens": CHUNK,
    "scheduler.max_sequences": 16,
    "router.policy": "round_robin",
    "transfer.late_read_s": 0.3,
    "transfer.stuck_read_s": 0.6,
    "log.level": "error",
}
NUM_TOKENS = 48
TIE = 1e-4  # of logits: under it, two right programs may choose differently; the median margin is 0.8
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)


@cache
def prompts(count: int, low: int, high: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    random = Random(seed)
    return tuple(tuple(random.randrange(1, VOCAB_SIZE) for _ in range(random.randint(low, high))) for _ in range(count))


@cache
@torch.inference_mode()
def is_greedy(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> bool:
    """Whether transformers says the same in fp32: each token is its choice after all before it, or ties with that.

    One forward pass.
    """
    logits = transformers_model(FAMILY)(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return bool((chosen >= logits.amax(-1) - TIE).all())


def assert_greedy(text: tuple[int, ...], answer: Answer, num_tokens: int = NUM_TOKENS, told: object = "") -> None:
    """Nothing lost, doubled or resampled."""
    assert len(answer.token_ids) == num_tokens, f"{told}: {len(answer.token_ids)} tokens"
    assert is_greedy(text, tuple(answer.token_ids)), f"{told}: {answer}"


class Chaos:
    """A cluster, a watch on it, and the ways to hurt it."""

    def __init__(self, cluster: PlainCluster, runner: asyncio.Runner) -> None:
        self.cluster = cluster
        self.runner = runner
        self.watch = Watch(cluster)

    def with_successor(self, hurt: Coroutine[object, object, T], pool: str, name: str) -> T:
        """Runs what kills a worker of the pool while its successor starts; returns when that is warm."""

        async def both() -> T:
            hurting = asyncio.ensure_future(hurt)
            await self.cluster.start_worker(pool, name)
            while len(self.names(pool)) > num_workers:
                await asyncio.sleep(0.001)  # until somebody was killed
            self.cluster.publish()
            result = await hurting
            await self.cluster.until_warm()
            return result

        num_workers = len(self.names(pool))

        return self.runner.run(both())

    def names(self, pool: str) -> list[str]:
        return sorted(name for name, worker in self.cluster.workers.items() if worker.pool == pool)

    def member(self, name: str) -> Member:
        member = self.cluster.workers[name].member
        assert member is not None
        return member

    def dead(self) -> list[str]:
        """Workers whose process has ended and that nobody took out."""
        return [name for name, worker in self.cluster.workers.items() if not worker.process.is_alive()]

    def freeze(self, name: str) -> None:
        self.cluster.workers[name].signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self.cluster.workers[name].signal(signal.SIGCONT)

    def deltas(
        self, text: tuple[int, ...], sampling: SamplingParams = GREEDY, request_id: str = ""
    ) -> AsyncGenerator[TokenDelta]:
        """One stream as the router gives it."""
        request = RouterRequest(request_id=request_id or uuid4().hex, prompt_token_ids=text, sampling=sampling)
        return self.cluster.router.generate(request)

    def ask(
        self, texts: Sequence[tuple[int, ...]], sampling: SamplingParams | Sequence[SamplingParams] = GREEDY
    ) -> list[asyncio.Task[Answer]]:
        """All at once, each in a task of its own."""
        each = [sampling] * len(texts) if isinstance(sampling, SamplingParams) else sampling
        return [asyncio.ensure_future(self.cluster.ask(list(t), s)) for t, s in zip(texts, each, strict=True)]

    async def together(
        self, texts: Sequence[tuple[int, ...]], sampling: SamplingParams | Sequence[SamplingParams] = GREEDY
    ) -> list[Answer]:
        return await asyncio.gather(*self.ask(texts, sampling))

    async def until_served(self, num_requests: int, name: str) -> pb.LoadReport:
        """The worker has heard of that many requests and ended none."""

        def heard(load: pb.LoadReport) -> bool:
            return load.num_waiting + load.num_running + load.num_pulling == num_requests

        return await self.watch.until(name, heard, f"{num_requests} requests")


@contextmanager
def running_chaos(
    settings: Mapping[str, object] | None = None, *, prefill: int = 1, decode: int = 1, main: WorkerMain = serve
) -> Iterator[Chaos]:
    every = {**SETTINGS, "model.path": str(checkpoint(FAMILY)), **(settings or {})}
    with running_cluster(every, prefill=prefill, decode=decode, main=main) as (cluster, runner):
        chaos = Chaos(cluster, runner)
        try:
            yield chaos
        finally:
            for worker in cluster.workers.values():
                with suppress(ProcessLookupError):
                    worker.signal(signal.SIGCONT)
            chaos.watch.stop()

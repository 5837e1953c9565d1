"""A router over real sessions, for tests: workers that end with the test, and what a test asks of the router."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from cluster.config import LimitsConfig, LogConfig, Role, RouterConfig
from cluster.log import Log
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import SamplingParams
from cluster.words_thread import WordsThread
from router.flight import RouterRequest, TokenDelta
from router.router import Router
from tests.support.scripted_worker import (
    FOREVER,
    Action,
    ScriptedWorker,
    membership,
)
from tests.support.words import SECRET, identity

DEADLINE_S = 20.0
PROMPT = (1, 2, 3, 4, 5)
_ids = itertools.count()


class Stage:
    """Starts scripted workers and stops them at the test's end."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def prefill(self, name: str = "prefill-0", **options: Any) -> ScriptedWorker:
        return self._add(ScriptedWorker(name, roles=[Role.PREFILL], **options))

    def encode(self, name: str = "encode-0", **options: Any) -> ScriptedWorker:
        return self._add(ScriptedWorker(name, roles=[Role.ENCODE], **options))

    def decode(self, name: str = "decode-0", *script: Action, **options: Any) -> ScriptedWorker:
        return self._add(ScriptedWorker(name, script=script or (FOREVER,), **options))

    def _add(self, worker: ScriptedWorker) -> ScriptedWorker:
        self._stack.callback(worker.stop)
        return worker


class Desk:
    """A started router and what a test wants of it."""

    def __init__(self, router: Router, metrics: Metrics) -> None:
        self.router = router
        self.metrics = metrics

    async def connect(self, *workers: ScriptedWorker, ready: bool = True) -> None:
        """Returns when every worker has a session and its load report was heard."""
        self.router.update_membership(membership(*workers))
        await eventually(lambda: self.num_sessions == len(workers))
        await self.router.load()  # answered after the report that each sends first
        assert self.router.ready() == ready

    @property
    def num_sessions(self) -> float:
        return self.metrics.value("sluice_words_sessions", {"peer_kind": "worker"})

    def request(self, *, max_tokens: int = 8, deadline_s: float | None = DEADLINE_S, **options: Any) -> RouterRequest:
        sampling = SamplingParams(max_tokens=max_tokens)
        options = {"prompt_token_ids": PROMPT, **options}
        return RouterRequest(request_id=f"r{next(_ids)}", sampling=sampling, deadline_s=deadline_s, **options)

    def dropped(self, reason: str) -> float:
        return self.metrics.value("sluice_words_dropped_frames_total", {"reason": reason})

    def failures(self, reason: str) -> float:
        return self.metrics.value("sluice_ingress_failures_total", {"reason": reason})


@asynccontextmanager
async def desk(
    words: WordsThread, *, max_requests: int = 64, max_queued: int = 0, block_size: int = 4, **options: Any
) -> AsyncIterator[Desk]:
    metrics = Metrics()
    router = Router(
        RouterConfig(**{"local_prefill": "never", "worker_wait_s": DEADLINE_S, **options}),
        LimitsConfig(max_requests=max_requests, max_queued=max_queued),
        words,
        identity("ingress-0", kind=pb.INGRESS),
        SECRET,
        metrics,
        Log.open("router", LogConfig(level="error")),
        block_size=block_size,
    )
    await router.start()
    try:
        yield Desk(router, metrics)
    finally:
        await router.stop()


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():
            await asyncio.sleep(0.002)


async def gather(router: Router, request: RouterRequest) -> tuple[list[int], TokenDelta]:
    """All tokens, in the order and at the indices they were delivered, and the last delta."""
    ids: list[int] = []
    async for delta in router.generate(request):
        assert delta.first_index == len(ids)
        ids += delta.token_ids
        if delta.finish is not None:
            return ids, delta
    raise AssertionError("ended without a finish")


def play(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(3 * DEADLINE_S):
            await scene()

    asyncio.run(bounded())


async def wait_for(worker: ScriptedWorker, holds: Callable[[ScriptedWorker], bool]) -> None:
    await asyncio.to_thread(worker.wait, holds)

"""A front door on a real port, over scripted workers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import uvicorn
from fastapi import FastAPI

from cluster.config import HttpConfig, LimitsConfig, LogConfig, RouterConfig
from cluster.log import Log
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.words_thread import WordsThread
from deploy.api_keys import ApiKeys
from deploy.openai_api import ApiService, create_app
from deploy.quota import Quotas
from deploy.served_model import ServedEncoder, ServedModel
from deploy.tokenizer import Tokenizer
from deploy.traces import Traces
from router.router import Router
from tests.support.scripted_worker import ScriptedWorker, membership
from tests.support.words import SECRET, identity, words_config

DEADLINE_S = 20.0
PROMPT = [5, 6, 7]
T = TypeVar("T")


@dataclass
class FrontDoor:
    url: str
    service: ApiService
    loop: asyncio.AbstractEventLoop

    @property
    def metrics(self) -> Metrics:
        return self.service.metrics

    @property
    def router(self) -> Router:
        return self.service.router

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """On the server's loop, where the router lives."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(DEADLINE_S)

    def connect(self, *workers: ScriptedWorker) -> None:
        """Returns when every worker has a session and its load report was heard."""
        self.router.update_membership(membership(*workers))
        self.run(self._heard(len(workers)))

    def outcomes(self, outcome: str) -> float:
        return self.metrics.value("sluice_ingress_requests_total", {"outcome": outcome})

    async def _heard(self, num_workers: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.metrics.value("sluice_words_sessions", {"peer_kind": "worker"}) != num_workers:
                await asyncio.sleep(0.002)
        await self.router.load()


@contextmanager
def front_door(
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int = 400,
    max_model_len: int = 512,
    api_keys: ApiKeys | None = None,
    limits: LimitsConfig | None = None,
    encoder: ServedEncoder | None = None,
    traces: Traces | None = None,
    add: Callable[[FastAPI, ApiService], None] = lambda app, service: None,
    **router: Any,
) -> Iterator[FrontDoor]:
    """uvicorn in a thread of its own, its router on the same loop. `add`: what else the app has."""
    limits = limits or LimitsConfig()
    routing = RouterConfig(**{"local_prefill": "always", "worker_wait_s": 0.3, **router})
    log = Log.open("ingress", LogConfig(level="error"))
    metrics = Metrics()
    with WordsThread(config=words_config(heartbeat_timeout_s=5.0)) as words:
        service = ApiService(
            router=Router(
                routing,
                limits,
                words,
                identity("ingress-0", kind=pb.INGRESS),
                SECRET,
                metrics,
                log,
                block_size=4,
            ),
            tokenizer=tokenizer,
            model=ServedModel(
                name="tiny", max_model_len=max_model_len, vocab_size=vocab_size, created=1, encoder=encoder
            ),
            http=HttpConfig(request_timeout_s=60),
            limits=limits,
            metrics=metrics,
            log=log,
            api_keys=api_keys,
            affinity_header=routing.affinity_header,
            quotas=Quotas(metrics),
            traces=traces,
        )
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            app = create_app(service)
            add(app, service)
            with _serve(service, app, listener) as loop:
                yield FrontDoor(f"http://127.0.0.1:{listener.getsockname()[1]}", service, loop)


@contextmanager
def _serve(service: ApiService, app: FastAPI, listener: socket.socket) -> Iterator[asyncio.AbstractEventLoop]:
    config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def run() -> None:
        await service.router.start()
        started.set()
        await server.serve([listener])
        await service.router.stop()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), name="uvicorn")
    thread.start()
    assert started.wait(DEADLINE_S)
    try:
        yield loop
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        loop.close()


def post(door: FrontDoor, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{door.url}{path}", json={"model": "tiny", **body}, timeout=30)


def complete(door: FrontDoor, **body: Any) -> httpx.Response:
    return post(door, "/v1/completions", **{"prompt": PROMPT, "max_tokens": 8, **body})


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a whole stream, which ends as OpenAI's do."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text_of(worker: ScriptedWorker, tokenizer: Tokenizer, count: int) -> str:
    told = worker.text or []
    return tokenizer.backend.decode([told[i % len(told)] for i in range(count)])

"""What a trace costs: CPU time of the ingress per request, with traces and without, beside that of all processes.

    python -m benchmarks.trace_cost        prints JSON

Blocks of requests with and without traces alternate on one running cluster, so that a busy machine falls on both. CPU
time is counted, not the clock: of this process, where the ingress runs (its HTTP server and the client left out, which
makes the share larger), the threads that encode and send the traces included; and of the worker processes. The
collector is a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import platform
import random
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import psutil
from fastapi import FastAPI

from cluster.log import Log
from cluster.traces_config import TracesConfig
from deploy.api_service import ApiService
from deploy.openai_api import create_app
from deploy.served_model import ServedModel
from deploy.traces import Traces
from tests.support.checkpoints import VOCAB_SIZE, checkpoint
from tests.support.otlp_receiver import otlp_receiver
from tests.support.plain_cluster import PlainCluster, plain_cluster

NUM_BLOCKS: Final = 8  # of each kind
BLOCK_REQUESTS: Final = 24
CONCURRENCY: Final = 8
PROMPT_TOKENS: Final = 128
OUTPUT_TOKENS: Final = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """CPU milliseconds per request, means over all blocks; `share_*` are of what they are without traces."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    spans: float
    ingress_ms: float
    workers_ms: float
    trace_ms: float
    trace_ms_error: float  # standard error of the mean
    share_of_ingress: float
    share_of_all: float
    machine: str


async def _ask(app: FastAPI, body: bytes) -> None:
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    sent: list[dict[str, Any]] = [{"type": "http.request", "body": body}]
    last = b""

    async def receive() -> dict[str, Any]:
        return sent.pop() if sent else await asyncio.Future()

    async def send(message: Any) -> None:
        nonlocal last
        last = message.get("body") or last

    await app(scope, receive, send)
    assert last == b"data: [DONE]\n\n", last


async def _block(app: FastAPI, draw: random.Random) -> None:
    slots = asyncio.Semaphore(CONCURRENCY)

    async def one(body: bytes) -> None:
        async with slots:
            await _ask(app, body)

    bodies: list[bytes] = []
    for _ in range(BLOCK_REQUESTS):
        prompt = [draw.randrange(1, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)]
        told = {"prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "stream": True, "temperature": 0}
        bodies.append(json.dumps({"model": "tiny", **told}).encode())
    await asyncio.gather(*(one(body) for body in bodies))


def _workers_s(cluster: PlainCluster) -> float:
    times = [psutil.Process(worker.process.pid).cpu_times() for worker in cluster.workers.values()]
    return sum(each.user + each.system for each in times)


async def measure() -> Cost:
    settings = {
        "model.path": str(checkpoint("llama")),
        "kv.block_size": 16,
        "kv.num_blocks": 1024,
        "scheduler.chunk_tokens": 128,
        "router.local_prefill": "never",
        "words.step_timeout_s": 60.0,
        "words.heartbeat_timeout_s": 60.0,
    }
    draw = random.Random(0)
    with otlp_receiver() as receiver:
        async with plain_cluster(settings, prefill=1, decode=1) as cluster:
            config = cluster.config
            log = Log.open("ingress", config.log)
            traces = Traces(
                TracesConfig(endpoint=receiver.endpoint), app="cost", instance="ingress", model="tiny", log=log
            )
            service = ApiService(
                router=cluster.router,
                tokenizer=None,
                model=replace(ServedModel.read(config), name="tiny"),
                http=config.http,
                limits=config.limits,
                metrics=cluster.metrics,
                log=log,
            )
            apps = {False: create_app(service), True: create_app(replace(service, traces=traces))}
            for app in apps.values():
                await _block(app, draw)  # warms up
            await asyncio.to_thread(traces.flush)
            num_spans = len(receiver.rows())
            own: dict[bool, list[float]] = {False: [], True: []}
            workers: list[float] = []
            for index in range(2 * NUM_BLOCKS):
                is_on = index % 4 in (1, 2)  # off, on, on, off: what drifts falls on both
                before, before_workers = time.process_time(), _workers_s(cluster)
                await _block(apps[is_on], draw)
                await asyncio.to_thread(traces.flush)
                own[is_on].append(1e3 * (time.process_time() - before) / BLOCK_REQUESTS)
                workers.append(1e3 * (_workers_s(cluster) - before_workers) / BLOCK_REQUESTS)
            num_spans = len(receiver.rows()) - num_spans
            await asyncio.to_thread(traces.stop)
    off, extra = statistics.mean(own[False]), statistics.mean(own[True]) - statistics.mean(own[False])
    error = sum(statistics.variance(each) / NUM_BLOCKS for each in own.values()) ** 0.5
    workers_ms = statistics.mean(workers)
    return Cost(
        requests=2 * NUM_BLOCKS * BLOCK_REQUESTS,
        prompt_tokens=PROMPT_TOKENS,
        output_tokens=OUTPUT_TOKENS,
        spans=num_spans / (NUM_BLOCKS * BLOCK_REQUESTS),
        ingress_ms=off,
        workers_ms=workers_ms,
        trace_ms=extra,
        trace_ms_error=error,
        share_of_ingress=extra / off,
        share_of_all=extra / (off + workers_ms),
        machine=f"{platform.machine()}, {psutil.cpu_count()} cores",
    )


def main() -> None:
    print(json.dumps(asdict(asyncio.run(measure())), indent=1))


if __name__ == "__main__":
    main()

"""What a trace costs: CPU time of the ingress per request, with traces and without, beside that of all processes.

    python -m benchmarks.trace_cost        prints JSON

CPU time is counted, not the clock: of this process, where the ingress runs (its HTTP server and the client left out,
which makes shares larger), the threads that encode and send the traces included; and of the worker processes. The
collector is a process of its own. Twice: a trace alone, all that front door, router and decode worker do for it, of a
request with the stages of a disaggregated one; and the difference between blocks of requests with and without traces
that alternate on one running cluster, which is small beside what such blocks differ by anyway.

Also what a request costs that is not traced: one that was not chosen, and one where traces are off.
"""

from __future__ import annotations

import asyncio
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import psutil
from fastapi import FastAPI

from cluster.config import Role
from cluster.log import Log
from cluster.metrics import Outcome
from cluster.protos import worker_pb2 as pb
from cluster.request import FinishReason, SamplingParams
from cluster.traces_config import TracesConfig
from deploy.api_service import ApiService
from deploy.openai_api import create_app
from deploy.served_model import ServedModel
from deploy.traces import Traces
from router.flight import RouterRequest
from router.plan import Candidate, Plan
from tests.support.checkpoints import VOCAB_SIZE, checkpoint
from tests.support.otlp_receiver import otlp_receiver
from tests.support.plain_cluster import PlainCluster, plain_cluster
from workers.stage_log import StageLog

NUM_BLOCKS: Final = 8  # of each kind
BLOCK_REQUESTS: Final = 24
CONCURRENCY: Final = 8
NUM_ALONE: Final = 2000
PROMPT_TOKENS: Final = 128
OUTPUT_TOKENS: Final = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """CPU time per request; `share_*` of `trace_ms`: at a sample rate of 1, and at the one that is the default."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    spans: float
    ingress_ms: float
    workers_ms: float
    trace_ms: float  # of a trace alone
    difference_ms: float
    difference_error_ms: float  # standard error
    not_chosen_us: float
    off_us: float
    share_of_ingress: float
    share_of_all: float
    default_rate: float
    default_share_of_ingress: float
    default_share_of_all: float
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


SOURCE: Final = pb.Identity(name="prefill-0", incarnation="p" * 32)
SINK: Final = pb.WorkerRef(name="decode-0", incarnation="d" * 32)
TICKET: Final = pb.Ticket(pid=4711, last=True, queue_s=0.001, compute_s=0.01)


def _told(*, on: bool) -> list[pb.SequenceTokens]:
    """The frames of one request as its decode worker makes them, with what a trace wants of them."""
    log = StageLog(SINK, 0.0, on=on)
    log.asked(SOURCE, PROMPT_TOKENS, 0.001)
    log.ticket(TICKET, 0.01)
    log.reading(SOURCE, "nixl", 0.01)
    log.read(8, 98304, 0.001)
    log.arrived(0.02)
    frames: list[pb.SequenceTokens] = []
    for index in range(OUTPUT_TOKENS):
        if log.on:
            log.emitted(0.02, 0.03, 0)
        frames.append(pb.SequenceTokens(token_ids=[3], first_token_index=index, stages=log.take()))
    log.close(0.5, "")
    frames.append(pb.SequenceTokens(finish=pb.LENGTH, stages=log.take(), route=pb.Route(decode=SINK, blocks=8)))
    return frames


def _cpu_s(times: int, act: Callable[[], object], after: Callable[[], object] = lambda: None) -> float:
    """Of one `act`, threads included, and of `after`, which follows every hundred of them."""
    before = time.process_time()
    for index in range(times):
        act()
        if index % 100 == 99:
            after()
    return (time.process_time() - before) / times


def _alone_s(traces: Traces) -> float:
    """Of one trace of eight spans, its export included: what frames cost less without one is taken off."""
    worker = Candidate(name="decode-0", incarnation="d" * 32, roles=frozenset({Role.DECODE}), pid=4711)
    plan = Plan(decode=worker, prefill=worker._replace(name="prefill-0", incarnation="p" * 32))

    def traced() -> None:
        trace = traces.begin("/v1/completions", {}, "f" * 32)
        assert trace is not None
        journal = trace.journal()
        journal.opened("e" * 32, PROMPT_TOKENS, 0)
        journal.admitted()
        journal.sent(1, plan, is_replay=False, num_emitted=0, leader="")
        *frames, last = _told(on=True)
        for frame in frames:
            journal.heard(frame, 1)
        journal.heard(last, 0)
        journal.ended(FinishReason.LENGTH, None)
        trace.end(Outcome.OK)

    traces.flush()
    return _cpu_s(NUM_ALONE, traced, traces.flush) - _cpu_s(NUM_ALONE, lambda: _told(on=False))


def _off_s() -> float:
    """What asks whether there is a trace, and finds none: once a token on either side, and some times a request."""
    request = RouterRequest(request_id="r", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=1))
    log = StageLog(SINK, 0.0, on=False)

    def asked() -> None:
        for _ in range(OUTPUT_TOKENS):
            if log.on or request.journal is not None:
                raise AssertionError("traces are off")
            log.take()
        StageLog(SINK, 0.0, on=False).close(0.5, "")

    return _cpu_s(NUM_ALONE, asked) - _cpu_s(NUM_ALONE, lambda: [None for _ in range(OUTPUT_TOKENS)])


def _traces(endpoint: str, sample_rate: float, log: Log) -> Traces:
    config = TracesConfig(endpoint=endpoint, sample_rate=sample_rate)
    return Traces(config, app="cost", instance="ingress", model="tiny", log=log)


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
            traces = _traces(receiver.endpoint, 1.0, log)
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
            alone = 1e3 * _alone_s(traces)
            await asyncio.to_thread(traces.stop)
            never = _traces(receiver.endpoint, 0.0, log)
            not_chosen = _cpu_s(10 * NUM_ALONE, lambda: never.begin("/v1/completions", {}, "f" * 32))
            await asyncio.to_thread(never.stop)
    off, extra = statistics.mean(own[False]), statistics.mean(own[True]) - statistics.mean(own[False])
    error = sum(statistics.variance(each) / NUM_BLOCKS for each in own.values()) ** 0.5
    workers_ms, rate = statistics.mean(workers), TracesConfig().sample_rate
    return Cost(
        requests=2 * NUM_BLOCKS * BLOCK_REQUESTS,
        prompt_tokens=PROMPT_TOKENS,
        output_tokens=OUTPUT_TOKENS,
        spans=num_spans / (NUM_BLOCKS * BLOCK_REQUESTS),
        ingress_ms=off,
        workers_ms=workers_ms,
        trace_ms=alone,
        difference_ms=extra,
        difference_error_ms=error,
        not_chosen_us=1e6 * not_chosen,
        off_us=1e6 * _off_s(),
        share_of_ingress=alone / off,
        share_of_all=alone / (off + workers_ms),
        default_rate=rate,
        default_share_of_ingress=rate * alone / off,
        default_share_of_all=rate * alone / (off + workers_ms),
        machine=f"{platform.machine()}, {psutil.cpu_count()} cores",
    )


def main() -> None:
    print(json.dumps(asdict(asyncio.run(measure())), indent=1))


if __name__ == "__main__":
    main()

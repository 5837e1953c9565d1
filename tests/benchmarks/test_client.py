"""The client against a server that writes HTTP as it likes."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

from benchmarks.arrivals import Workload
from benchmarks.client import Job, Sample, send_all

WORKLOAD = Workload(rate=0.0, num_requests=1, prompt_tokens=(2, 2), output_tokens=(3, 3), vocab_size=9, seed=0)
JOB = Job("http://", "tiny", WORKLOAD, timeout_s=20)
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
ROUTE = {
    "prefix_hit_tokens": 64,
    "blocks": 3,
    "plan": "disaggregated",
    "ttft_ms": 12.5,
    "queue_ms": 1.5,
    "prefill_ms": 6.5,
}
EVENTS = [
    {"choices": [{"token_ids": [5]}]},
    {"choices": [{"token_ids": [6, 7]}]},
    {"choices": [], "usage": {"sluice": ROUTE}},
]
BODY = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in EVENTS) + b"data: [DONE]\n\n"


def ask(answer: bytes) -> tuple[Sample, dict[str, object]]:
    """What the client makes of an answer, and the request body that it sent."""
    bodies: list[dict[str, object]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.partition("Content-Length: ")[2].split("\r\n")[0])
        bodies.append(json.loads(await reader.readexactly(length)))
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def talk() -> Sample:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            job = Job.from_json(replace(JOB, url=f"http://{host}:{port}").to_json())
            assert job.workload == WORKLOAD
            return (await send_all(job))[0]

    return asyncio.run(talk()), bodies[0]


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    framed = b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces)
    return STREAM + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


def test_a_stream_in_chunks_that_cut_its_lines() -> None:
    for size in (1, 7, 1000):
        sample, body = ask(chunked(BODY, size))
        assert sample.complete and len(sample.token_s) == 3
        assert sample.token_s[1] == sample.token_s[2], "they came in one event"
        assert (sample.hit_tokens, sample.pulled_blocks, sample.plan) == (64, 3, "disaggregated")
        assert (sample.server_ttft_s, sample.computed_s) == (0.0125, 0.008)
        assert body["prompt"] == WORKLOAD.arrivals()[0].prompt and body["max_tokens"] == body["min_tokens"] == 3


def test_a_stream_that_ends_with_its_connection() -> None:
    sample, _ = ask(STREAM + b"\r\n" + BODY)
    assert sample.complete


def test_refusals_and_cut_streams_are_failures() -> None:
    error = json.dumps({"error": {"message": "busy"}}).encode()
    refused, _ = ask(b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\n\r\n" + error)
    assert (refused.error, refused.complete) == ("busy", False)
    cut, _ = ask(chunked(BODY, 7)[:150])
    assert "IncompleteRead" in cut.error and not cut.complete


def test_a_server_that_is_not_there_is_a_failure() -> None:
    (sample,) = asyncio.run(send_all(replace(JOB, url="http://127.0.0.1:1")))
    assert "Connect" in sample.error and not sample.complete

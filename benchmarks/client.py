"""The client of the serving benchmark, a process of its own so that it takes nothing from the server's loop.

    python -m benchmarks.client < JOB > SAMPLES

Reads one JSON object (Job), sends the requests when they are due, streams the answers, writes a JSON list of samples.
Requests are sent at their time whatever is still open, and times count from when a request was due: a server that
stalls cannot hide it. HTTP/1.1 by hand: a general client would spend more on a token than the server does.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

from benchmarks.arrivals import Arrival, Workload


@dataclass(frozen=True, slots=True)
class Endpoint:
    url: str  # http://host:port
    model: str
    timeout_s: float = field(default=60.0, kw_only=True)  # of one request


@dataclass(frozen=True, slots=True)
class Job(Endpoint):
    workload: Workload

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        tree = json.loads(text)
        workload = tree.pop("workload")
        for name in ("prompt_tokens", "output_tokens", "long_prompt_tokens"):
            workload[name] = tuple(workload[name])
        words = workload["words"]
        workload["words"] = words and {int(token_id): word for token_id, word in words.items()}
        return cls(workload=Workload(**workload), **tree)


@dataclass(slots=True)
class Sample:
    """One request as its client saw it; seconds after it was due, but for `due_s`, which is after the start."""

    due_s: float
    num_prompt_tokens: int
    num_wanted: int
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)  # one for each token
    error: str = ""
    hit_tokens: int = 0  # of the prompt, in any cache
    pulled_blocks: int = 0
    plan: str = ""  # the server's word
    server_ttft_s: float = 0.0  # from the start of its route to the first token there
    computed_s: float = 0.0  # the prompt, as its worker says: since it was asked
    num_tokens: int | None = None  # where `token_s` has only the first and the last one

    @classmethod
    def list_from_json(cls, text: bytes) -> list[Sample]:
        return [cls(**tree) for tree in json.loads(text)]

    @property
    def complete(self) -> bool:
        return not self.error and self.count == self.num_wanted

    @property
    def count(self) -> int:
        """Tokens that came."""
        return len(self.token_s) if self.num_tokens is None else self.num_tokens

    @property
    def gaps(self) -> list[float]:
        """Between tokens, as far as each one's time is known."""
        return [] if self.num_tokens is not None else [after - before for before, after in pairwise(self.token_s)]

    @property
    def mean_gap(self) -> float:
        """0 with a single token."""
        return (self.token_s[-1] - self.token_s[0]) / (self.count - 1) if self.count > 1 else 0.0


async def ask(endpoint: Endpoint, arrival: Arrival, due: float, sample: Sample) -> None:
    """Fills in `sample`. `due` is of time.perf_counter."""
    body = {
        "model": endpoint.model,
        "prompt": arrival.text or arrival.prompt,
        "max_tokens": arrival.num_tokens,
        "min_tokens": arrival.num_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
        "return_route": True,
    }
    sample.sent_s = time.perf_counter() - due
    try:
        async with asyncio.timeout(endpoint.timeout_s):
            async for event in events(endpoint.url, "/v1/completions", json.dumps(body).encode()):
                _take(sample, json.loads(event), time.perf_counter() - due)
    except (OSError, EOFError, ValueError) as error:  # a refused connection, a cut stream, TimeoutError
        sample.error = sample.error or f"{type(error).__name__}: {error}"


def _take(sample: Sample, tree: dict, now_s: float) -> None:  # type: ignore[type-arg]
    if "error" in tree:
        sample.error = tree["error"]["message"]
    for choice in tree.get("choices", ()):
        sample.token_s += [now_s] * len(choice.get("token_ids") or ())
    route = (tree.get("usage") or {}).get("sluice")
    if route:
        sample.hit_tokens, sample.pulled_blocks = route["prefix_hit_tokens"], route["blocks"]
        sample.plan = route["plan"]
        sample.server_ttft_s = route["ttft_ms"] / 1e3
        sample.computed_s = (route["queue_ms"] + route["prefill_ms"]) / 1e3


async def events(url: str, path: str, body: bytes) -> AsyncIterator[bytes]:
    """The data of each server-sent event but [DONE]. An answer that is no stream is one event."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port or 80)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        fields = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().splitlines()
        chunks = _chunks(reader) if "transfer-encoding: chunked" in fields else _rest(reader)
        if not any(field.startswith("content-type: text/event-stream") for field in fields):
            yield b"".join([chunk async for chunk in chunks])
            return
        buffer = b""
        async for chunk in chunks:
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    yield line[6:]
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while chunk := await reader.read(1 << 16):
        yield chunk


async def send_all(job: Job) -> list[Sample]:
    arrivals = job.workload.arrivals()
    samples = [Sample(a.at_s, len(a.prompt), a.num_tokens) for a in arrivals]
    if not job.workload.rate:
        for arrival, sample in zip(arrivals, samples, strict=True):
            await ask(job, arrival, time.perf_counter(), sample)
        return samples
    start = time.perf_counter() + 0.05

    async def at_its_time(arrival: Arrival, sample: Sample) -> None:
        due = start + arrival.at_s
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await ask(job, arrival, due, sample)

    await asyncio.gather(*map(at_its_time, arrivals, samples))
    return samples


def main() -> None:
    job = Job.from_json(sys.stdin.read())
    json.dump([asdict(sample) for sample in asyncio.run(send_all(job))], sys.stdout)


if __name__ == "__main__":
    main()

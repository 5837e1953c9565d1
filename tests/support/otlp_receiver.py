"""A receiver of OTLP/HTTP traces as a process of its own, and the spans that it got, as trees.

python -m tests.support.otlp_receiver    tells its port, then serves until it is killed: POST /v1/traces as a collector
takes them, GET /spans the spans so far as JSON
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

Value = str | int | float | bool


@dataclass(slots=True, kw_only=True)
class Span:
    """As received; times in ns since 1970."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: str
    start_ns: int
    end_ns: int
    error: str  # "": none
    attributes: dict[str, Value]
    resource: dict[str, Value]
    events: dict[str, int]  # name: time
    children: list[Span] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    def find(self, *names: str) -> Span:
        """The one child of the first name, its one child of the second, ..."""
        if not names:
            return self
        found = self.all(names[0])
        assert len(found) == 1, f"{self.name} has {len(found)} children {names[0]!r}: {[c.name for c in self.children]}"
        return found[0].find(*names[1:])

    def all(self, name: str) -> list[Span]:
        return [child for child in self.children if child.name == name]

    def below(self) -> Iterator[Span]:
        for child in self.children:
            yield child
            yield from child.below()


def roots(rows: Iterable[dict[str, Any]]) -> list[Span]:
    """The trees, in order of their begins; spans whose parent is elsewhere are roots."""
    spans = {row["span_id"]: Span(**row) for row in rows}
    tops: list[Span] = []
    for span in sorted(spans.values(), key=lambda span: (span.start_ns, span.end_ns)):
        (spans[span.parent_id].children if span.parent_id in spans else tops).append(span)
    return tops


@dataclass(slots=True)
class OtlpReceiver:
    url: str
    process: subprocess.Popen[str]

    @property
    def endpoint(self) -> str:
        return f"{self.url}/v1/traces"

    def rows(self) -> list[dict[str, Any]]:
        return httpx.get(f"{self.url}/spans", timeout=10, trust_env=False).raise_for_status().json()

    def traces(self) -> dict[str, Span]:
        """What one replica sent, by trace id: one root each."""
        tops = roots(self.rows())
        traces = {top.trace_id: top for top in tops}
        assert len(traces) == len(tops), f"{len(tops)} roots of {len(traces)} traces"
        return traces


@contextmanager
def otlp_receiver() -> Iterator[OtlpReceiver]:
    process = subprocess.Popen([sys.executable, "-m", __name__], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield OtlpReceiver(f"http://127.0.0.1:{int(process.stdout.readline())}", process)
    finally:
        process.kill()
        process.communicate()


def _rows(body: bytes) -> Iterator[dict[str, Any]]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.proto.trace.v1.trace_pb2 import Span as Wire
    from opentelemetry.proto.trace.v1.trace_pb2 import Status

    def values(pairs: Iterable[Any]) -> dict[str, Any]:
        return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}

    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                is_error = span.status.code == Status.STATUS_CODE_ERROR
                yield {
                    "name": span.name,
                    "trace_id": span.trace_id.hex(),
                    "span_id": span.span_id.hex(),
                    "parent_id": span.parent_span_id.hex(),
                    "kind": Wire.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    "start_ns": span.start_time_unix_nano,
                    "end_ns": span.end_time_unix_nano,
                    "error": (span.status.message or "error") if is_error else "",
                    "attributes": values(span.attributes),
                    "resource": values(resource.resource.attributes),
                    "events": {event.name: event.time_unix_nano for event in span.events},
                }


def main() -> None:
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            is_taken = self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
            if is_taken:
                is_gzip = self.headers.get("content-encoding") == "gzip"
                received.extend(_rows(gzip.decompress(body) if is_gzip else body))
            self._answer(200 if is_taken else 400, b"", "application/x-protobuf")

        def do_GET(self) -> None:
            self._answer(200, json.dumps(received).encode(), "application/json")

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: stdout is for the port."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()

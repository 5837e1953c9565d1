"""A pass-through on a port of its own, which notes what a client sent and what it was answered."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """`body` and `answer` are JSON; a stream's answer is its events, as a list. None: there was none."""

    method: str
    path: str
    body: Any
    status: int
    answer: Any


@dataclass(frozen=True, slots=True)
class RecordingProxy:
    url: str
    exchanges: list[Exchange] = field(default_factory=list)
    """In the order in which they ended."""


def exchange(client: httpx.Client, method: str, path: str, body: Any) -> Exchange:
    """Asks, and waits for the whole answer."""
    return _noted(method, path, body, client.request(method, path, json=body))


def _noted(method: str, path: str, body: Any, answer: httpx.Response) -> Exchange:
    return Exchange(method=method, path=path, body=body, status=answer.status_code, answer=_tree(answer))


def _tree(answer: httpx.Response) -> Any:
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]
    return json.loads(answer.text) if answer.text else None


@contextmanager
def recording_proxy(target: str) -> Iterator[RecordingProxy]:
    """Passes on whole answers: a client that streams gets all events at once."""
    with httpx.Client(base_url=target, timeout=60, trust_env=False) as client:
        noted: list[Exchange] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                content = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {"content-type": self.headers.get("content-type", "application/json")}
                answer = client.request(self.command, self.path, content=content or None, headers=headers)
                noted.append(_noted(self.command, self.path, json.loads(content) if content else None, answer))
                self.send_response(answer.status_code)
                self.send_header("content-type", answer.headers["content-type"])
                self.send_header("content-length", str(len(answer.content)))
                self.end_headers()
                with suppress(OSError):  # the client is gone
                    self.wfile.write(answer.content)

            do_GET = do_POST = pass_on

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, name="recording-proxy")
        thread.start()
        try:
            yield RecordingProxy(f"http://127.0.0.1:{server.server_address[1]}", noted)
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

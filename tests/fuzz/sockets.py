"""Clients without manners: broken HTTP, strange headers, bodies in crumbs, and leaving at any moment."""

from __future__ import annotations

import json
import select
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from hypothesis import strategies as st

from tests.fuzz.bodies import Json, completions, written_json
from tests.fuzz.oracle import Answer
from tests.support.public_door import MODEL

DEADLINE_S: Final = 60.0
_BREATHER_S: Final = 0.002

# What the proxy and Serve say themselves to what is no HTTP (404: to GET *), without a body of ours and an id.
PROXY_STATUSES: Final = frozenset({400, 403, 404, 405, 408, 413, 414, 422, 431, 501, 505})


@dataclass(frozen=True)
class Wire:
    """Bytes for one connection. `pieces` go out one by one, `leave_after` counts the bytes to read before leaving."""

    pieces: list[bytes]
    half_close: bool = False
    leave_after: int | None = None  # None: stays until the answers end
    reset: bool = False
    num_answers: int | None = None  # that must come, all from us; None: the proxy may say what it likes
    request_id: str | None = field(default=None)  # that must come back


def talk(url: str, wire: Wire) -> list[Answer]:
    """The answers, until the server or this client ends the connection. Raises TimeoutError for a hang."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), DEADLINE_S) as connection:
        connection.settimeout(DEADLINE_S)
        with suppress(ConnectionError):  # the server may end what it dislikes before it has read it all
            for number, piece in enumerate(wire.pieces):
                if number:
                    select.select([], [], [], _BREATHER_S)
                connection.sendall(piece)
            if wire.half_close:
                connection.shutdown(socket.SHUT_WR)
        data = _read(connection, wire)
        if wire.reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return [] if wire.leave_after is not None else answers_in(data)


def _read(connection: socket.socket, wire: Wire) -> bytes:
    data = b""
    with suppress(ConnectionError):
        while wire.leave_after is None or len(data) < wire.leave_after:
            new = connection.recv(65536)
            if not new:
                break
            data += new
    return data


def answers_in(data: bytes) -> list[Answer]:
    """One after the other, as HTTP/1.1 frames them. Raises AssertionError for a cut one."""
    found: list[Answer] = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, f"a cut head: {head[:200]!r}"
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split(" ")[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        assert len(headers) == len(lines), f"a name stands twice: {lines}"
        if status == 100:
            continue
        content = b""
        if headers.get("transfer-encoding") == "chunked":
            while True:
                size, end, data = data.partition(b"\r\n")
                assert end, "a cut chunk"
                content += data[: int(size, 16)]
                data = data[int(size, 16) + 2 :]
                if int(size, 16) == 0:
                    break
        elif "content-length" in headers:
            size = int(headers["content-length"])
            assert len(data) >= size, f"{len(data)} of {size} bytes"
            content, data = data[:size], data[size:]
        else:
            content, data = data, b""
        found.append(Answer(status, headers, content))
    return found


def request(path: str, body: bytes, *headers: tuple[str, bytes], method: str = "POST", keep: bool = False) -> bytes:
    """A well-formed one, unless `headers` break it."""
    names = {name.lower() for name, _ in headers}
    head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n".encode()
    if "content-length" not in names and "transfer-encoding" not in names:
        head += b"content-length: %d\r\n" % len(body)
    if "content-type" not in names:
        head += b"content-type: application/json\r\n"
    if not keep:
        head += b"connection: close\r\n"
    return head + b"".join(name.encode() + b": " + value + b"\r\n" for name, value in headers) + b"\r\n" + body


def _short(**more: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 2, **more}).encode()


@st.composite
def broken_http(draw: st.DrawFn) -> Wire:
    """Nothing here needs a good answer; all need the server to go on."""
    body = _short()
    kind = draw(
        st.sampled_from(["length", "chunks", "noise", "method", "line", "doubled", "pipelined noise", "expect"])
    )
    path = "/v1/completions"
    half_close = True
    if kind == "length":
        length = draw(
            st.sampled_from(
                [b"-1", b"0", b"1", b"5", b"99999999999999999999", b"abc", b"", b"1e3", b"+5", b"5, 5", b"8388609"]
            )
        )
        data = request(path, body, ("content-length", length))
    elif kind == "chunks":
        chunk = draw(
            st.sampled_from(
                [
                    b"zz\r\n",
                    b"-1\r\nx",
                    b"ffffffffffffffff\r\nx",
                    b"5\r\nabc",
                    b"0\r\n\r\n",
                    b"1;x=y\r\nx\r\n0\r\n\r\n",
                    b"5\nhello\n0\n\n",
                ]
            )
        )
        coding = draw(st.sampled_from([b"chunked", b"gzip, chunked", b"identity", b"chunked, chunked", b"xchunked"]))
        data = request(path, chunk, ("transfer-encoding", coding))
    elif kind == "noise":
        data = draw(st.binary(min_size=1, max_size=200))
    elif kind == "method":
        method = draw(
            st.sampled_from(
                ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "CONNECT", "FOO", "post", "P\x00ST", ""]
            )
        )
        data = request(draw(st.sampled_from([path, "/health", "/metrics", "/v1/models"])), b"", method=method)
        if method == "HEAD":
            return Wire([data], half_close=True, leave_after=1)
    elif kind == "line":
        target = draw(
            st.sampled_from(
                [
                    "*",
                    "//",
                    "/%00",
                    "/%ff",
                    "/v1/models/%2e%2e/%2e%2e/etc",
                    "/v1/models/" + "a" * 3000,
                    "http://x/",
                    "/\u00e9",
                    "/v1/models/%0d%0ax:%20y",
                    "/?" + "q" * 9000,
                    "/v1/completions/",
                ]
            )
        )
        data = request(target, body, method=draw(st.sampled_from(["GET", "POST"])))
    elif kind == "doubled":
        data = request(path, body, ("content-length", b"3"), ("content-length", b"%d" % len(body)))
    elif kind == "expect":
        data = request(path, body, ("expect", draw(st.sampled_from([b"100-continue", b"200-ok"]))))
    else:
        data = request(path, body, keep=True) + draw(st.binary(max_size=60))
    return Wire([data], half_close=half_close)


@st.composite
def strange_headers(draw: st.DrawFn) -> Wire:
    """A good body with headers that HTTP allows, or does not."""
    value = draw(
        st.one_of(
            st.binary(max_size=60),
            st.binary(min_size=100, max_size=300),
            st.sampled_from([b"a" * 128, b"a" * 129, b"a" * 9000, b"\x01", b"a\tb", b"\xe9", b"id-7"]),
        )
    )
    name = draw(
        st.sampled_from(
            [
                "x-request-id",
                "X-Request-ID",
                "content-type",
                "authorization",
                "traceparent",
                "accept",
                "x-forwarded-for",
                "cookie",
                "te",
                "origin",
                "content-encoding",
                "accept-encoding",
            ]
        )
    )
    clean = value.replace(b"\r", b"").replace(b"\n", b"")
    data = request("/v1/completions", _short(), (name, clean))
    if name.lower() == "x-request-id" and clean and len(clean) <= 128 and all(0x21 <= each <= 0x7E for each in clean):
        return Wire([data], num_answers=1, request_id=clean.decode())
    return Wire([data])


@st.composite
def slow_and_many(draw: st.DrawFn) -> Wire:
    """Well-formed: in crumbs, half closed, chunked, or several in one packet. All must be answered."""
    num = draw(st.integers(1, 4))
    bodies = [_short(max_tokens=draw(st.integers(1, 4)), seed=1, stream=draw(st.booleans())) for _ in range(num)]
    if draw(st.booleans()):
        chunked = [b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n" for body in bodies]
        whole = [
            request("/v1/completions", body, ("transfer-encoding", b"chunked"), keep=n < num - 1)
            for n, body in enumerate(chunked)
        ]
    else:
        whole = [request("/v1/completions", body, keep=n < num - 1) for n, body in enumerate(bodies)]
    data = b"".join(whole)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if start < end]
    return Wire(pieces, num_answers=num)


@st.composite
def vanishing(draw: st.DrawFn, vocab_size: int) -> Wire:
    """A good request, long enough to be left in any of its stages."""
    body: Json = draw(completions(vocab_size))
    body |= {"max_tokens": 64, "min_tokens": 0, "stream": draw(st.booleans())}
    if body["stream"]:
        body.pop("best_of", None)
    data = request("/v1/completions", written_json(body))
    if draw(st.integers(0, 3)) == 0:
        return Wire([data[: draw(st.integers(0, len(data) - 1))]], leave_after=0, reset=draw(st.booleans()))
    leave_after = draw(st.sampled_from([0, 0, 1, 300, 700, 2000, 10_000]))
    return Wire([data], half_close=draw(st.booleans()), leave_after=leave_after, reset=draw(st.booleans()))

"""From token ids to text as they arrive, stop strings, and server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

import tokenizers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from tokenizers.decoders import DecodeStream

from cluster.errors import Cancelled

T = TypeVar("T")
DONE_EVENT = b"data: [DONE]\n\n"
_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Text of one sequence, piece by piece: no character is cut, and the pieces add up to the whole."""

    def __init__(self, backend: tokenizers.Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._backend = backend
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self.num_chars = 0  # handed out
        self._pending = False

    def push(self, token_id: int) -> str:
        """What the token completes: "" while a character is unfinished."""
        self._ids.append(token_id)
        text = self._stream.step(self._backend, token_id)
        self._pending = text is None
        self.num_chars += len(text or "")
        return text or ""

    def flush(self) -> str:
        """At the end: what an unfinished character leaves, as replacement characters."""
        if not self._pending:
            return ""
        self._pending = False
        whole = self._backend.decode(self._ids, skip_special_tokens=self._skip)
        tail = whole[self.num_chars :]
        self.num_chars += len(tail)
        return tail if tail.strip(_REPLACEMENT) == "" else ""


class Cut(NamedTuple):
    """`text` may be shown; `stop` is the stop string that ended it, which is not part of it."""

    text: str
    stop: str | None


class StopFinder:
    """Finds the first stop string in a text that comes in pieces; holds back what might become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> Cut:
        if not self._stops:
            return Cut(text, None)
        text = self._held + text
        found = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, _, stop = min(found)  # the first; of two at one place the longer
            self._held = ""
            return Cut(text[:at], stop)
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return Cut(text[: len(text) - keep], None)

    def flush(self) -> str:
        """The end came: what was held back is plain text."""
        held, self._held = self._held, ""
        return held


def event(data: Mapping[str, object] | str) -> bytes:
    """One server-sent event; a string is JSON already."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class EventStream(Response):
    """Sends events as they come; closes their source as soon as the client is gone, read or not."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__()
        self._events = events
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with suppress(Cancelled):
                await unless_gone(self._send(send), receive)
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(work: Coroutine[object, object, T], receive: Receive) -> T:
    """The result of `work`, which is cancelled when the client disconnects; then raises Cancelled.

    The request's body has been read: what `receive` has to say is that the client is gone.
    """
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Cancelled("the client is gone")
        return doing.result()
    finally:
        for task in (doing, watching):
            task.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""Request bodies: JSON as its standard has it, of bounded depth. What Python's reader takes beyond that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, Final, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from cluster.errors import InvalidRequest

MAX_DEPTH: Final = 100


class UnsupportedMedia(InvalidRequest):
    status = 415


class JsonRoute(APIRoute):
    """Reads the body before FastAPI does, which then finds it read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if "POST" not in (self.methods or ()):
            return handle

        async def read_and_handle(request: Request) -> Response:
            _check_type(request.headers.get("content-type"))
            tree = read_json(await request.body())
            request.scope["headers"] = [
                *((name, value) for name, value in request.scope["headers"] if name != b"content-type"),
                (b"content-type", b"application/json"),
            ]
            read = Request(request.scope, request.receive)
            read._json, read._body = tree, b"{}"
            return await handle(read)

        return read_and_handle


def _check_type(content_type: str | None) -> None:
    """A client that names none means JSON."""
    kind = (content_type or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedMedia(f"the body is {kind[:80]!r}; send JSON, with content-type application/json")


def read_json(body: bytes) -> object:
    """Raises InvalidRequest."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is no UTF-8 (byte {error.start}); send JSON in UTF-8") from None
    try:
        tree = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is no JSON: {error}; send one JSON object") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # an integer of thousands of digits, or a constant
        raise InvalidRequest(f"the body is no JSON: {str(error)[:200]}; send one JSON object") from None
    if text.count("{") + text.count("[") > MAX_DEPTH:
        _check_depth(tree)
    if "\\u" in text:
        _check_characters(tree)
    return tree


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _check_depth(tree: object) -> None:
    level = [tree]
    for _ in range(MAX_DEPTH):
        level = [
            below
            for each in level
            if isinstance(each, dict | list)
            for below in (each.values() if isinstance(each, dict) else each)
            if isinstance(below, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"the body is nested deeper than {MAX_DEPTH} levels; send it flatter")


def _check_characters(tree: object) -> None:
    """Half of a surrogate pair is no character: nothing could be made of it."""
    try:
        json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            "the body has half of a surrogate pair (\\ud800 to \\udfff); send whole characters"
        ) from None

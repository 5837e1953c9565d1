"""Request headers as Serve's replicas read them: what they cannot read, or must not obey, does not reach them.

`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names `middlewares`; the application sets it for its replicas.
"""

from __future__ import annotations

from typing import Final

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.gate import is_request_id

IMPORT_PATH: Final = "deploy.serve_headers.middlewares"

# They steer Serve: its timeout beside ours, whether it tells us that a client is gone, which replica's model.
_STEERING: Final = frozenset(
    {b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-session-id", b"serve-multiplexed-model-id"}
)


def middlewares() -> list[Middleware]:
    """Called by Serve once in each replica."""
    return [Middleware(CleanHeaders)]


class CleanHeaders:
    """Serve decodes some headers as UTF-8 and answers 500 to others; no header of ours needs more than ASCII."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["headers"] = [(name, value) for name, value in scope["headers"] if _is_clean(name, value)]
        await self._app(scope, receive, send)


def _is_clean(name: bytes, value: bytes) -> bool:
    """An id that the gate does not take is none for Serve either: it would be told beside the gate's own."""
    if name == b"x-request-id":
        return is_request_id(value.decode("latin-1"))
    return name.isascii() and name.lower().replace(b"_", b"-") not in _STEERING

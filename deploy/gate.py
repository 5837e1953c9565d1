"""What every HTTP request passes first: its id, its key, the size of its body. Plain ASGI, no routing."""

from __future__ import annotations

import re
from typing import Final
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.api_keys import ApiKey, ApiKeys
from deploy.openai_errors import body, response

_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
# For probes and scrapers, which hold no key; and the status page, which asks people for theirs and holds no figures.
_OPEN_PATHS: Final = frozenset({"/", "/health", "/metrics", "/ready"})


def is_request_id(sent: str) -> bool:
    """Whether a client's own id is taken: it goes into logs and back into headers."""
    return _REQUEST_ID.fullmatch(sent) is not None


class Gate:
    """Answers 401 and 413 itself. `scope["state"]` gets the `request_id` that the client sent, or a new one, and
    the `api_key` that it showed, or None."""

    def __init__(
        self, app: ASGIApp, *, api_keys: ApiKeys | None, max_body_bytes: int, ids_are_echoed: bool = False
    ) -> None:
        """No keys: everybody may come in. `ids_are_echoed`: who called us tells the client the id that it sent."""
        self._app = app
        self._keys = api_keys
        self._max_body_bytes = max_body_bytes
        self._ids_are_echoed = ids_are_echoed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        is_good = is_request_id(sent_id)
        request_id = sent_id if is_good else uuid4().hex
        told = is_good and self._ids_are_echoed
        scope.setdefault("state", {}).update(request_id=request_id, id_is_told=told)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start" and not told:
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        key = self._key_of(headers.get("authorization", ""))
        scope["state"]["api_key"] = key
        if self._keys is not None and key is None and scope["path"] not in _OPEN_PATHS:
            refusal = body(401, "the API key is missing or wrong; send the header Authorization: Bearer KEY")
            answer = response(401, refusal, {"www-authenticate": "Bearer"})
            await answer(scope, receive, send_with_id)
            return
        whole = await self._read(headers, receive)
        if whole is None:
            limit = f"the body is over the limit of {self._max_body_bytes} bytes; send a shorter prompt"
            await response(413, body(413, limit, code="body_too_large"))(scope, receive, send_with_id)
            return
        await self._app(scope, _Replay(whole, receive), send_with_id)

    def _key_of(self, authorization: str) -> ApiKey | None:
        scheme, _, key = authorization.partition(" ")
        return self._keys.find(key.strip()) if self._keys is not None and scheme.lower() == "bearer" else None

    async def _read(self, headers: Headers, receive: Receive) -> list[Message] | None:
        """The messages of the whole body, or what came before the client left; None: it is too long."""
        announced = headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > self._max_body_bytes:
            return None
        messages: list[Message] = []
        num_bytes = 0
        while True:
            message = await receive()
            messages.append(message)
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                return None
            if message["type"] != "http.request" or not message.get("more_body", False):
                return messages


class _Replay:
    """First the messages already read, then what else comes."""

    def __init__(self, messages: list[Message], receive: Receive) -> None:
        self._messages = messages[::-1]
        self._receive = receive

    async def __call__(self) -> Message:
        return self._messages.pop() if self._messages else await self._receive()

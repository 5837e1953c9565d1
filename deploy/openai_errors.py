"""Errors as OpenAI writes them: a status, a body, and headers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, Final

from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from cluster.errors import Busy, InvalidRequest, RequestError
from cluster.metrics import Outcome
from deploy.openai_answers import ErrorBody, ErrorDetail
from deploy.request_fields import UNSUPPORTED

_TYPES: Final[Mapping[int, tuple[str, str | None]]] = {
    400: ("invalid_request_error", None),
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "model_not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "context_length_exceeded"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "queue_full"),
    499: ("cancelled", "client_closed_request"),
    503: ("service_unavailable", "no_worker"),
    504: ("timeout", "deadline_exceeded"),
}
_OUTCOMES: Final[Mapping[int, Outcome]] = {
    429: Outcome.BUSY,
    499: Outcome.CANCELLED,
    503: Outcome.NO_WORKER,
    504: Outcome.DEADLINE,
}
_MAX_SHOWN: Final = 80


class UnknownModel(InvalidRequest):
    status = 404


class Unsupported(InvalidRequest):
    """A parameter that OpenAI documents and that cannot be done here."""


def body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> ErrorBody:
    kind, usual_code = _TYPES.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
    return ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code or usual_code))


def body_of(error: RequestError) -> ErrorBody:
    code = error.limit if isinstance(error, Busy) else UNSUPPORTED if isinstance(error, Unsupported) else None
    return body(error.status, str(error), param=error.param if isinstance(error, InvalidRequest) else None, code=code)


def outcome_of(error: RequestError) -> Outcome:
    return _OUTCOMES.get(error.status, Outcome.INVALID if error.status < 500 else Outcome.FAILED)


def response(status: int, answer: ErrorBody, headers: Mapping[str, str] | None = None) -> Response:
    return Response(answer.model_dump_json(), status, dict(headers or {}), "application/json")


def response_of(error: RequestError) -> Response:
    headers = {"retry-after": str(ceil(error.retry_after_s))} if isinstance(error, Busy) else {}
    return response(error.status, body_of(error), headers)


def of_validation(error: RequestValidationError) -> InvalidRequest:
    """The first thing wrong with a request body, with its parameter."""
    first: Mapping[str, Any] = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    kind = first["type"]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return InvalidRequest(f"the body is no JSON: {reason}; send one JSON object")
    if not where:
        text = first["msg"].removeprefix("Value error, ")
        if kind == "value_error":
            return InvalidRequest(text)
        return InvalidRequest(f"the body is no JSON object ({text}); send one, with content-type application/json")
    param = ".".join(part for part in where if part.isidentifier() or part.isdigit())[:_MAX_SHOWN]
    if kind == "extra_forbidden":
        return InvalidRequest(f"unrecognized request argument supplied: {param}; remove it", param)
    if kind == UNSUPPORTED:
        return Unsupported(f"{param}: {first['msg']}; got {_shown(first.get('input'))}", where[0])
    if kind == "missing":
        return InvalidRequest(f"you must provide {param}", param)
    text = first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{param}: {text}; got {_shown(first.get('input'))}", where[0])


def _shown(value: object) -> str:
    """A rejected value, short: a person finds it, and a log holds no document."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 8:
        return f"a list of {len(value)}"
    if isinstance(value, str):
        value = value[: _MAX_SHOWN + 1]
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"

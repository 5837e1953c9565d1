"""What a client of the HTTP API reads from a stream, for commands that talk to a front door."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from typing import Any

import httpx

from cluster.errors import InvalidRequest, SluiceError


def events(
    url: str, body: Mapping[str, object], *, timeout_s: float, headers: Mapping[str, str] | None = None
) -> Generator[dict[str, Any]]:
    """The chunks of a streamed answer; closing it early cancels the request.

    Raises InvalidRequest when the front door refuses the request (4xx), SluiceError when it fails.
    """
    try:
        with httpx.stream(
            "POST", url, json=body, headers=dict(headers or {}), timeout=timeout_s, trust_env=False
        ) as stream:
            if stream.status_code != 200:
                text = stream.read().decode(errors="replace")
                kind = InvalidRequest if 400 <= stream.status_code < 500 else SluiceError
                raise kind(f"the front door answers {stream.status_code}: {_message(text)}")
            for line in stream.iter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise SluiceError(f"the request failed: {event['error']['message']}")
                yield event
    except httpx.InvalidURL as error:
        raise SluiceError(f"{url}: {error}; give one like http://127.0.0.1:8000") from None
    except httpx.HTTPError as error:
        raise SluiceError(f"the front door does not answer: {error!r}") from error


def _message(text: str) -> str:
    """Of an OpenAI-style error; anything else as it is."""
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text

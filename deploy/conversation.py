"""A conversation with a served model over HTTP: what was said, and what each answer took."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass

import httpx

from cluster.errors import InvalidRequest, SluiceError
from deploy.event_client import events

_ANSWER_S = 300.0  # without a word from the front door


@dataclass(slots=True)
class Turn:
    """One answer as the client saw it; seconds of the monotonic clock. The prompt's figures come with the end."""

    asked_at: float
    text: str = ""
    num_tokens: int = 0
    first_at: float | None = None
    last_at: float = 0.0
    num_first: int = 0  # tokens that came at once, with the first one
    num_prompt_tokens: int | None = None
    num_hit_tokens: int = 0
    finish: str | None = None  # None: it was stopped here

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_at is None else self.first_at - self.asked_at

    @property
    def tokens_per_s(self) -> float | None:
        """Of those after the first."""
        if self.first_at is None or self.last_at == self.first_at:
            return None
        return (self.num_tokens - self.num_first) / (self.last_at - self.first_at)


class Conversation:
    """Each question is sent with all that was said before, so its prompt begins like the one before."""

    def __init__(
        self, url: str, model: str, *, system: str | None, settings: Mapping[str, object], api_key: str | None = None
    ) -> None:
        """`settings`: fields of /v1/chat/completions that every question has."""
        self._url = f"{url}/v1/chat/completions"
        self._body = {
            **settings,
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        self._headers = authorization(api_key)
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._said: list[dict[str, str]] = []
        self.turn = Turn(time.monotonic())

    def reset(self) -> None:
        """Forgets all but the system's message."""
        self._said.clear()

    def ask(self, question: str) -> Generator[str]:
        """The text of the answer as it comes; `turn` tells the rest. Closing it early stops the answer.

        What came of a stopped answer belongs to the conversation; a question without any answer does not. Raises
        InvalidRequest when the front door refuses the question, SluiceError when the answer breaks off.
        """
        asked = {"role": "user", "content": question}
        turn = self.turn = Turn(time.monotonic())
        messages = [*self._system, *self._said, asked]
        stream = events(self._url, self._body | {"messages": messages}, timeout_s=_ANSWER_S, headers=self._headers)
        try:
            with closing(stream):
                for event in stream:
                    yield from _take(turn, event)
        finally:
            if turn.text:
                self._said += [asked, {"role": "assistant", "content": turn.text}]


def _take(turn: Turn, event: Mapping) -> Generator[str]:
    for choice in event["choices"]:
        new_ids = choice.get("token_ids") or []
        if new_ids:
            turn.last_at = time.monotonic()
            if turn.first_at is None:
                turn.first_at, turn.num_first = turn.last_at, len(new_ids)
        turn.num_tokens += len(new_ids)
        turn.finish = choice.get("finish_reason") or turn.finish
        text = choice["delta"].get("content") or ""
        turn.text += text
        if text:
            yield text
    if usage := event.get("usage"):
        turn.num_prompt_tokens = usage["prompt_tokens"]
        turn.num_tokens = usage["completion_tokens"]
        turn.num_hit_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


def served_model(url: str, api_key: str | None) -> str:
    """The name of the model behind `url`. Raises SluiceError."""
    try:
        answer = httpx.get(f"{url}/v1/models", headers=authorization(api_key), timeout=_ANSWER_S, trust_env=False)
        if answer.status_code == 401:
            raise InvalidRequest(f"--url {url} wants an API key; set it in the environment, see --help")
        return answer.raise_for_status().json()["data"][0]["id"]
    except httpx.InvalidURL as error:
        raise SluiceError(f"--url {url}: {error}; give one like http://127.0.0.1:8000") from None
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise SluiceError(
            f"--url {url} does not answer as a model server ({error}); "
            "give the address that `python -m deploy serve` prints after `ready`"
        ) from None


def authorization(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"authorization": f"Bearer {api_key}"}

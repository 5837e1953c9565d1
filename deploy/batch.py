"""Requests of a file: one JSON object per line in, one per line out, in the same order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from cluster.errors import Busy, InvalidRequest, RequestError
from cluster.metrics import Outcome
from deploy.api_service import ApiService
from deploy.completion import Completion, Piece, Tally
from deploy.openai_errors import body_of, of_validation, outcome_of
from deploy.openai_schema import ChatRequest, CompletionRequest, RouteReport

_PROMPTS = ("prompt_token_ids", "prompt", "messages")
_NEEDS_TEXT = ("prompt", "messages", "stop")
_NOT_HERE = ("stream", "stream_options", "return_token_ids", "return_route")

Line = CompletionRequest | ChatRequest | InvalidRequest


@dataclass(slots=True)
class Summary:
    """Of the lines that are done."""

    num_lines: int = 0
    num_errors: int = 0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    routes: list[RouteReport] = field(default_factory=list)


def read(text: str, model: str) -> Line:
    """What a line asks for, or what is wrong with it. `model` is named for lines that name none."""
    try:
        tree = json.loads(text)
    except ValueError as error:
        return InvalidRequest(f"the line is no JSON: {error}; write one JSON object per line")
    if not isinstance(tree, dict):
        return InvalidRequest(f"the line holds {type(tree).__name__}; write one JSON object per line")
    given = [name for name in _PROMPTS if name in tree]
    if len(given) != 1:
        found = " and ".join(given) or "no prompt"
        return InvalidRequest(f"the line has {found}; give one of {', '.join(_PROMPTS)}", (given or _PROMPTS)[0])
    for name in _NOT_HERE:
        if name in tree:
            return InvalidRequest(f"{name} has no meaning in a file; remove it", name)
    if given == ["prompt_token_ids"]:
        ids = tree.pop("prompt_token_ids")
        if not (isinstance(ids, list) and ids and all(type(token) is int and 0 <= token < 2**31 for token in ids)):
            return InvalidRequest("prompt_token_ids: give a list of token ids that is not empty", "prompt_token_ids")
        tree["prompt"] = ids
    kind = ChatRequest if given == ["messages"] else CompletionRequest
    try:
        return kind.model_validate({"model": model, **tree, "return_token_ids": True, "return_route": True})
    except ValidationError as error:
        return of_validation(RequestValidationError(error.errors()))


def needs_tokenizer(texts: Sequence[str]) -> bool:
    """Whether any line speaks of text. Lines that are no JSON do not matter."""
    return any(f'"{name}"' in text for text in texts for name in _NEEDS_TEXT)


class Batch:
    """Runs the lines of a file on one router. Belongs to its event loop."""

    def __init__(self, service: ApiService, *, max_open: int, explain: bool) -> None:
        self.summary = Summary()
        self._service = service
        self._explain = explain
        self._slots = asyncio.Semaphore(max_open)

    async def run(self, lines: Sequence[Line], output: TextIO, on_done: Callable[[], None]) -> None:
        """Writes an answer as soon as all lines before it are answered. `on_done` is called once for each line."""
        answers = [asyncio.create_task(self._answer(line)) for line in lines]
        for answer in answers:
            answer.add_done_callback(lambda _: on_done())
        try:
            for answer in answers:
                json.dump(await answer, output, ensure_ascii=False, separators=(",", ":"))
                output.write("\n")
                output.flush()
        finally:
            for answer in answers:
                answer.cancel()
            await asyncio.gather(*answers, return_exceptions=True)

    async def _answer(self, line: Line) -> Mapping[str, object]:
        """Never raises a RequestError: that is an answer, too."""
        async with self._slots:
            self.summary.num_lines += 1
            if isinstance(line, InvalidRequest):
                return self._failed(line)
            while True:
                tally = Tally(self._service.metrics)
                try:
                    answer = await self._complete(line, tally)
                except Busy as error:  # a file can wait
                    tally.end(outcome_of(error))
                    await asyncio.sleep(error.retry_after_s)
                except RequestError as error:
                    tally.end(outcome_of(error))
                    return self._failed(error)
                else:
                    tally.end(Outcome.OK)
                    return answer

    async def _complete(self, line: CompletionRequest | ChatRequest, tally: Tally) -> Mapping[str, object]:
        service = self._service
        preparing = service.chat(line, tally) if isinstance(line, ChatRequest) else service.complete(line, tally)
        completion = await preparing
        pieces = [piece async for piece in completion.pieces()]
        return self._finished(completion, pieces)

    def _finished(self, completion: Completion, pieces: Sequence[Piece]) -> Mapping[str, object]:
        usage = completion.usage(with_route=True)
        assert usage.sluice is not None
        self.summary.num_prompt_tokens += usage.prompt_tokens
        self.summary.num_tokens += usage.completion_tokens
        self.summary.routes.append(usage.sluice)
        text = {"text": "".join(piece.text for piece in pieces)} if self._service.tokenizer is not None else {}
        route = {"route": usage.sluice.model_dump(mode="json")} if self._explain else {}
        return {
            "token_ids": [token for piece in pieces for token in piece.token_ids],
            **text,
            "finish_reason": pieces[-1].finish,
            "usage": usage.model_dump(mode="json", exclude={"sluice"}, exclude_none=True),
            **route,
        }

    def _failed(self, error: RequestError) -> Mapping[str, object]:
        self.summary.num_errors += 1
        return body_of(error).model_dump(mode="json")

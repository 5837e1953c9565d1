"""Requests of a file: one JSON object per line in, one per line out, in the same order."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from cluster.errors import Busy, InvalidRequest, RequestError
from cluster.metrics import Outcome
from deploy.answer_file import AnswerFile, name_of
from deploy.answer_writers import ChatWriter, CompletionWriter
from deploy.api_service import ApiService
from deploy.openai_answers import RouteReport, Usage
from deploy.openai_errors import body_of, of_validation, outcome_of
from deploy.openai_requests import ChatRequest, CompletionRequest
from deploy.tally import Tally

_PROMPTS = ("prompt_token_ids", "prompt", "messages")
_NOT_HERE = ("stream", "stream_options", "return_token_ids", "return_route")
_READ_AHEAD = 4  # lines begun or done and not yet written, for each that may be open: a long one holds up no other

Line = CompletionRequest | ChatRequest | InvalidRequest


@dataclass(slots=True)
class Summary:
    """Of the lines that are done."""

    num_lines: int = 0
    num_errors: int = 0
    num_tokens: int = 0
    routes: list[RouteReport] = field(default_factory=list)


def read(line: bytes, model: str, seed: int) -> Line:
    """What a line asks for, or what is wrong with it. `model` and `seed` are for lines that name none."""
    try:
        tree = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return InvalidRequest(f"the line is no UTF-8: {error.reason} at byte {error.start}; convert it")
    except ValueError as error:
        reason = f"the line is no JSON: {error}" if line.strip() else "the line is blank"
        return InvalidRequest(f"{reason}; write one JSON object per line")
    except RecursionError:
        return InvalidRequest("the line is nested too deeply; write one flat JSON object per line")
    if b"\\ud" in line.lower() and not _is_text(tree):
        return InvalidRequest("the line has half a surrogate pair, which is no character; remove it")
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
    if tree.get("seed") is None:
        tree["seed"] = seed
    kind = ChatRequest if given == ["messages"] else CompletionRequest
    try:
        return kind.model_validate({"model": model, **tree, "return_token_ids": True, "return_route": True})
    except ValidationError as error:
        return of_validation(RequestValidationError(error.errors()))


def _is_text(tree: object) -> bool:
    try:
        json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


class Batch:
    """Runs the lines of a file on one router. Belongs to its event loop."""

    def __init__(self, service: ApiService, *, max_open: int, explain: bool) -> None:
        self.summary = Summary()
        self._service = service
        self._explain = explain
        self._max_open = max_open
        self._slots = asyncio.Semaphore(max_open)
        self._running: set[Tally] = set()

    @property
    def num_tokens(self) -> int:
        """Those of lines that are not done, too."""
        return self.summary.num_tokens + sum(tally.num_tokens for tally in self._running)

    async def run(
        self, lines: Sequence[bytes], fingerprints: Sequence[int], output: AnswerFile, on_done: Callable[[], None]
    ) -> None:
        """Answers what `output` does not hold, each line as soon as all before it are answered.

        A line without a seed takes its fingerprint, so that the same file gives the same answers again. `on_done` is
        called once for each line. Raises SluiceError when an answer cannot be written.
        """
        window: deque[asyncio.Task[Mapping[str, object]]] = deque()
        todo = zip(lines[output.num_kept :], fingerprints[output.num_kept :], strict=True)
        try:
            for line, fingerprint in todo:
                if len(window) == _READ_AHEAD * self._max_open:
                    output.append(await window[0])
                    window.popleft()
                task = asyncio.create_task(self._answer(line, fingerprint))
                task.add_done_callback(lambda _: on_done())
                window.append(task)
            while window:
                output.append(await window[0])
                window.popleft()
        finally:
            for task in window:
                task.cancel()
            await asyncio.gather(*window, return_exceptions=True)

    async def _answer(self, line: bytes, fingerprint: int) -> Mapping[str, object]:
        """Never raises a RequestError: that is an answer, too."""
        async with self._slots:
            request = read(line, self._service.model.name, fingerprint)
            if isinstance(request, InvalidRequest):
                return self._failed(request)
            while True:
                tally = Tally(self._service.metrics)
                self._running.add(tally)
                try:
                    answer = await self._complete(request, tally)
                except Busy as error:  # a file can wait
                    tally.end(outcome_of(error))
                    await asyncio.sleep(error.retry_after_s)
                except RequestError as error:
                    tally.end(outcome_of(error))
                    return self._failed(error)
                else:
                    tally.end(Outcome.OK)
                    return {"fingerprint": name_of(fingerprint), **answer}
                finally:
                    self._running.remove(tally)

    async def _complete(self, request: CompletionRequest | ChatRequest, tally: Tally) -> Mapping[str, object]:
        """As the API would answer, with what a file has no use for left out."""
        service = self._service
        if isinstance(request, ChatRequest):
            generation = await service.chat(request, tally)
            writer = ChatWriter(generation, request, service.model, service.tokenizer)
        else:
            generation = await service.complete(request, tally)
            writer = CompletionWriter(generation, request, service.model, service.tokenizer)
        pieces = await generation.collect()
        usage = generation.usage(with_route=True)
        assert usage.sluice is not None
        routes = usage.sluice_sequences or [usage.sluice]
        self.summary.num_lines += 1
        self.summary.num_tokens += usage.completion_tokens
        self.summary.routes += routes
        answer = json.loads(writer.whole(pieces))
        choices = [self._choice(choice) for choice in answer["choices"]]
        told = choices[0] if len(choices) == 1 else {"choices": choices}
        outputs = {name: answer[name] for name in ("encoder_outputs",) if name in answer}
        explained: dict[str, object] = {}
        if self._explain:
            explained["route"] = usage.sluice.model_dump(mode="json")
        if self._explain and len(routes) > 1:
            explained["routes"] = [route.model_dump(mode="json") for route in routes]
        return {**told, **outputs, "usage": _counts(usage), **explained}

    def _choice(self, choice: Mapping[str, Any]) -> Mapping[str, object]:
        """The message of a chat is its text, and the tool calls where there are some."""
        message = choice.get("message", {})
        text = message["content"] if message else choice["text"]
        asked = {name: choice.get(name) for name in ("logprobs", "prompt_logprobs", "score")}
        return {
            "token_ids": choice["token_ids"],
            "text": None if self._service.tokenizer is None else text,
            "finish_reason": choice["finish_reason"],
            **({"tool_calls": message["tool_calls"]} if "tool_calls" in message else {}),
            **{name: value for name, value in asked.items() if value is not None},
        }

    def _failed(self, error: RequestError) -> Mapping[str, object]:
        self.summary.num_lines += 1
        self.summary.num_errors += 1
        return body_of(error).model_dump(mode="json")


def _counts(usage: Usage) -> Mapping[str, int]:
    """What was cached depends on what else ran, and stands in the route: an answer is the same in every run."""
    return usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"})

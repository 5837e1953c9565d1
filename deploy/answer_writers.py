"""From pieces to what goes over HTTP: one answer, or the events of a stream."""

from __future__ import annotations

import json
import time
from typing import Protocol

from pydantic import BaseModel

from deploy.answer_reader import AnswerReader
from deploy.completion import Piece
from deploy.generation import Generation
from deploy.logprobs import LogprobWriter
from deploy.openai_answers import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChunkChoice,
    CompletionAnswer,
    CompletionChoice,
    Delta,
    TokenLogprob,
    Usage,
)
from deploy.openai_requests import ChatRequest, CompletionRequest, SamplingRequest
from deploy.served_model import ServedModel
from deploy.structured_output import may_call
from deploy.tokenizer import Tokenizer


class AnswerWriter(Protocol):
    """Of one generation."""

    generation: Generation

    def whole(self, pieces: list[Piece]) -> str:
        """One whole piece for each choice, in order."""
        ...

    def chunks(self, piece: Piece) -> list[str]:
        """The events that tell it."""
        ...

    def last(self) -> str | None:
        """After the text: the usage, where it is asked for."""
        ...


class _Frame:
    """What answers of both endpoints say alike."""

    def __init__(
        self, generation: Generation, body: SamplingRequest, model: ServedModel, tokenizer: Tokenizer | None
    ) -> None:
        self.generation = generation
        self.logprobs = LogprobWriter(tokenizer)
        self._begun: set[int] = set()
        options = body.stream_options
        self._usage = options is not None and options.include_usage
        self._running_usage = options is not None and options.continuous_usage_stats
        self._route = body.return_route
        self._ids = body.return_token_ids or tokenizer is None  # without a tokenizer they are all there is
        self._num_prompt_logprobs = body.prompt_logprobs
        self._model = body.model
        self._fingerprint = model.fingerprint
        self._created = int(time.time())

    def begins(self, piece: Piece) -> bool:
        """Whether it is the first of its choice."""
        if piece.index in self._begun:
            return False
        self._begun.add(piece.index)
        return True

    def token_ids(self, piece: Piece) -> list[int] | None:
        return list(piece.token_ids) if self._ids else None

    def prompt_logprobs(self, piece: Piece) -> list[TokenLogprob | None] | None:
        """With the first piece."""
        if self._num_prompt_logprobs is None:
            return None
        return self.logprobs.of_prompt(self.generation.prompt_of(piece), piece, self._num_prompt_logprobs)

    def whole(self, kind: type[CompletionAnswer] | type[ChatAnswer], prefix: str, choices: list[BaseModel]) -> str:
        answer = self._answer(kind, prefix, choices, self._final_usage())
        if isinstance(answer, CompletionAnswer):
            answer.encoder_outputs = self.generation.encoder_outputs
        return _json(answer, usage_is_null=False)

    def chunk(self, kind: type[CompletionAnswer] | type[ChatChunk], prefix: str, choices: list[BaseModel]) -> str:
        usage = self.generation.usage(with_route=False) if self._running_usage else None
        return _json(self._answer(kind, prefix, choices, usage), usage_is_null=self._usage)

    def last(self, kind: type[CompletionAnswer] | type[ChatChunk], prefix: str) -> str | None:
        if not (self._usage or self._route):
            return None
        return _json(self._answer(kind, prefix, [], self._final_usage()), usage_is_null=False)

    def _final_usage(self) -> Usage:
        return self.generation.usage(with_route=self._route)

    def _answer(
        self,
        kind: type[CompletionAnswer] | type[ChatAnswer] | type[ChatChunk],
        prefix: str,
        choices: list[BaseModel],
        usage: Usage | None,
    ) -> BaseModel:
        return kind.model_construct(
            id=prefix + self.generation.request_id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=usage,
        )


class CompletionWriter:
    def __init__(
        self, generation: Generation, body: CompletionRequest, model: ServedModel, tokenizer: Tokenizer | None
    ) -> None:
        self.generation = generation
        self._frame = _Frame(generation, body, model, tokenizer)
        self._echo = body.echo
        self._num_logprobs = body.logprobs

    def whole(self, pieces: list[Piece]) -> str:
        return self._frame.whole(CompletionAnswer, "cmpl-", [self._choice(piece) for piece in pieces])

    def chunks(self, piece: Piece) -> list[str]:
        return [self._frame.chunk(CompletionAnswer, "cmpl-", [self._choice(piece)])]

    def last(self) -> str | None:
        return self._frame.last(CompletionAnswer, "cmpl-")

    def _choice(self, piece: Piece) -> CompletionChoice:
        """An echoed prompt stands before the first piece and shifts the offsets of all."""
        frame, first = self._frame, self._frame.begins(piece)
        prompt = self.generation.prompt_of(piece)
        logprobs = None
        if self._num_logprobs is not None and self._echo and first:
            logprobs = frame.logprobs.echoed(prompt, piece, self._num_logprobs)
        elif self._num_logprobs is not None:
            logprobs = frame.logprobs.of_completion(piece)
            if self._echo:
                logprobs.text_offset = [len(prompt.text) + offset for offset in logprobs.text_offset]
        return CompletionChoice(
            index=piece.index,
            text=prompt.text + piece.text if self._echo and first else piece.text,
            logprobs=logprobs,
            finish_reason=piece.finish,
            token_ids=frame.token_ids(piece),
            prompt_logprobs=frame.prompt_logprobs(piece) if first else None,
            score=piece.score,
        )


class ChatWriter:
    def __init__(
        self, generation: Generation, body: ChatRequest, model: ServedModel, tokenizer: Tokenizer | None
    ) -> None:
        self.generation = generation
        self._frame = _Frame(generation, body, model, tokenizer)
        self._logprobs = body.logprobs
        self._format = tokenizer.tool_format if tokenizer is not None and may_call(body) else None
        self._readers: dict[int, AnswerReader] = {}

    def whole(self, pieces: list[Piece]) -> str:
        return self._frame.whole(ChatAnswer, "chatcmpl-", [self._choice(piece) for piece in pieces])

    def chunks(self, piece: Piece) -> list[str]:
        """The role comes first, alone."""
        frame, first = self._frame, self._frame.begins(piece)
        choices: list[ChunkChoice] = []
        if first:
            role = Delta(role="assistant", content="")
            choices.append(ChunkChoice(index=piece.index, delta=role, finish_reason=None))
        reader = self._readers.setdefault(piece.index, AnswerReader(self._format))
        delta = reader.read(piece)
        choices.append(
            ChunkChoice(
                index=piece.index,
                delta=delta,
                logprobs=self._told(piece),
                finish_reason=reader.finish(piece),
                token_ids=frame.token_ids(piece),
                prompt_logprobs=frame.prompt_logprobs(piece) if first else None,
            )
        )
        return [frame.chunk(ChatChunk, "chatcmpl-", [choice]) for choice in choices]

    def last(self) -> str | None:
        return self._frame.last(ChatChunk, "chatcmpl-")

    def _choice(self, piece: Piece) -> ChatChoice:
        reader = AnswerReader(self._format)
        return ChatChoice(
            index=piece.index,
            message=reader.message(piece),
            logprobs=self._told(piece),
            finish_reason=reader.finish(piece),
            token_ids=self._frame.token_ids(piece),
            prompt_logprobs=self._frame.prompt_logprobs(piece),
        )

    def _told(self, piece: Piece) -> ChatLogprobs | None:
        return ChatLogprobs(content=self._frame.logprobs.of_chat(piece)) if self._logprobs else None


def _json(answer: BaseModel, *, usage_is_null: bool) -> str:
    """Absent stays absent, but null stands where OpenAI writes null."""
    tree = answer.model_dump(exclude_none=True)
    for choice in tree["choices"]:
        choice.setdefault("finish_reason", None)
        logprobs = choice.setdefault("logprobs", None)
        if logprobs is not None and "content" in logprobs:
            logprobs["refusal"] = None
        message = choice.get("message")
        if message is not None:
            message.setdefault("content", None)
            message.setdefault("refusal", None)
    if usage_is_null:
        tree.setdefault("usage", None)
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":"))

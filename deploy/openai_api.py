"""The HTTP routes: OpenAI's completions and chat, health, metrics."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Annotated, Literal

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import RequestError
from cluster.metrics import CONTENT_TYPE, Outcome
from deploy.api_service import ApiService
from deploy.completion import Completion, Piece, Tally
from deploy.gate import Gate
from deploy.openai_errors import UnknownModel, body, body_of, of_validation, outcome_of, response, response_of
from deploy.openai_schema import (
    Answer,
    AssistantMessage,
    ChatChoice,
    ChatRequest,
    ChunkChoice,
    CompletionChoice,
    CompletionRequest,
    Delta,
    ErrorBody,
    ModelCard,
    ModelList,
)
from deploy.stream import DONE_EVENT, EventStream, event, unless_gone

__all__ = ["ApiService", "create_app"]

Kind = Literal["text_completion", "chat.completion"]


def create_app(service: ApiService) -> FastAPI:
    """The app of one ingress replica. Its router must be started on the loop that serves the app."""
    app = FastAPI(title="sluice", docs_url=None, redoc_url=None, responses={"4XX": {"model": ErrorBody}})
    app.add_middleware(Gate, api_keys=service.api_keys, max_body_bytes=service.limits.max_body_bytes)
    _add_errors(app, service)

    @app.post("/v1/completions", response_model=Answer)
    async def completions(request: Request, ask: Annotated[CompletionRequest, Body()]) -> Response:
        return await _answer(service, request, ask, service.complete(ask, _tally(service, request)), "text_completion")

    @app.post("/v1/chat/completions", response_model=Answer)
    async def chat(request: Request, ask: Annotated[ChatRequest, Body()]) -> Response:
        return await _answer(service, request, ask, service.chat(ask, _tally(service, request)), "chat.completion")

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[_card(service)])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        if name != service.model.name:
            raise UnknownModel(f"the model {name!r} does not exist; use {service.model.name!r}", "model")
        return _card(service)

    @app.get("/health")
    async def health() -> Response:
        """Progress: a warm plan exists, and each session it needs is open, which a worker that does not step ends."""
        ready = service.router.ready()
        state = {"status": "ok"} if ready else {"status": "not ready", "reason": service.router.why_not_ready()}
        return Response(json.dumps(state), 200 if ready else 503, media_type="application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    return app


def _tally(service: ApiService, request: Request) -> Tally:
    """Begins to count the request; whoever ends it finds the tally in its state."""
    request.state.tally = tally = Tally(service.metrics)
    return tally


def _card(service: ApiService) -> ModelCard:
    model = service.model
    return ModelCard(id=model.name, created=model.created, max_model_len=model.max_model_len)


# ---------------------------------------------------------------- answers


async def _answer(
    service: ApiService,
    request: Request,
    ask: CompletionRequest | ChatRequest,
    preparing: Awaitable[Completion],
    kind: Kind,
) -> Response:
    """Errors before the first token have a status of their own, so a stream begins with its first token."""
    completion = await preparing
    writer = _Writer(completion, ask, kind, has_text=service.tokenizer is not None)
    pieces = completion.pieces()
    if not ask.stream:
        async with aclosing(pieces):
            whole = await unless_gone(_collect(pieces), request.receive)
        answer = writer.whole(whole)
        _log_end(service, completion, whole.finish)
        completion.tally.end(Outcome.OK)
        return Response(_json(answer), media_type="application/json")
    try:
        first = await unless_gone(anext(pieces), request.receive)  # type: ignore[arg-type]
    except BaseException:
        await pieces.aclose()
        raise
    return _CountedStream(_events(service, writer, first, pieces), pieces, completion.tally)


async def _collect(pieces: AsyncGenerator[Piece]) -> Piece:
    text: list[str] = []
    token_ids: list[int] = []
    finish = None
    async for piece in pieces:
        text.append(piece.text)
        token_ids += piece.token_ids
        finish = piece.finish
    return Piece(text="".join(text), token_ids=tuple(token_ids), finish=finish)


async def _events(
    service: ApiService, writer: _Writer, first: Piece, pieces: AsyncGenerator[Piece]
) -> AsyncGenerator[bytes]:
    completion = writer.completion
    async with aclosing(pieces):
        try:
            if writer.is_chat:
                yield event(_json(writer.role()))
            yield event(_json(writer.chunk(first)))
            finish = first.finish
            async for piece in pieces:
                yield event(_json(writer.chunk(piece)))
                finish = piece.finish
        except RequestError as error:  # the status has been sent: the stream says it
            completion.tally.end(outcome_of(error))
            _log_error(service, completion.request.request_id, error)
            yield event(body_of(error).model_dump_json())
        else:
            if writer.wants_usage:
                yield event(_json(writer.last()))
            _log_end(service, completion, finish)
            completion.tally.end(Outcome.OK)
        yield DONE_EVENT


class _CountedStream(EventStream):
    """A stream that ends early was cancelled by its client."""

    def __init__(self, events: AsyncGenerator[bytes], pieces: AsyncGenerator[Piece], tally: Tally) -> None:
        super().__init__(events)
        self._pieces = pieces
        self._tally = tally

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._pieces.aclose()  # closing events that never began does not reach it
            self._tally.end(Outcome.CANCELLED)


class _Writer:
    """Pieces as answers or chunks of either endpoint."""

    def __init__(
        self, completion: Completion, ask: CompletionRequest | ChatRequest, kind: Kind, *, has_text: bool
    ) -> None:
        self.completion = completion
        self.is_chat = kind == "chat.completion"
        self.wants_usage = bool(ask.stream_options and ask.stream_options.include_usage) or ask.return_route
        self._kind: Kind = kind
        self._ids = ask.return_token_ids or not has_text  # without a tokenizer they are all there is
        self._route = ask.return_route
        self._model = ask.model
        self._created = int(time.time())

    def whole(self, piece: Piece) -> Answer:
        token_ids = self._token_ids(piece)
        usage = self.completion.usage(with_route=self._route)
        if self.is_chat:
            message = AssistantMessage(content=piece.text)
            choice = ChatChoice(message=message, finish_reason=piece.finish, token_ids=token_ids)
            return self._frame([choice]).model_copy(update={"usage": usage})
        choice = CompletionChoice(text=piece.text, finish_reason=piece.finish, token_ids=token_ids)
        return self._frame([choice]).model_copy(update={"usage": usage})

    def role(self) -> Answer:
        return self._frame([ChunkChoice(delta=Delta(role="assistant", content=""), finish_reason=None)])

    def chunk(self, piece: Piece) -> Answer:
        token_ids = self._token_ids(piece)
        if self.is_chat:
            delta = Delta(content=piece.text)
            return self._frame([ChunkChoice(delta=delta, finish_reason=piece.finish, token_ids=token_ids)])
        return self._frame([CompletionChoice(text=piece.text, finish_reason=piece.finish, token_ids=token_ids)])

    def last(self) -> Answer:
        """After the text: no choices, the usage."""
        return self._frame([]).model_copy(update={"usage": self.completion.usage(with_route=self._route)})

    def _frame(self, choices: list[CompletionChoice] | list[ChatChoice] | list[ChunkChoice]) -> Answer:
        streamed = any(isinstance(choice, ChunkChoice) for choice in choices) or (self.is_chat and not choices)
        prefix = "chatcmpl-" if self.is_chat else "cmpl-"
        return Answer(
            id=prefix + self.completion.request.request_id,
            object="chat.completion.chunk" if streamed else self._kind,
            created=self._created,
            model=self._model,
            choices=choices,
        )

    def _token_ids(self, piece: Piece) -> list[int] | None:
        return list(piece.token_ids) if self._ids else None


def _json(answer: Answer) -> str:
    """Absent stays absent, but finish_reason and logprobs are null where OpenAI writes null."""
    tree = answer.model_dump(exclude_none=True)
    for choice in tree["choices"]:
        choice.setdefault("finish_reason", None)
        choice.setdefault("logprobs", None)
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":"))


# ---------------------------------------------------------------- errors


def _add_errors(app: FastAPI, service: ApiService) -> None:
    def ended(request: Request, error: RequestError) -> Response:
        tally: Tally = getattr(request.state, "tally", None) or Tally(service.metrics)
        tally.end(outcome_of(error))
        _log_error(service, request.state.request_id, error)
        return response_of(error)

    async def on_request_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return ended(request, error)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return ended(request, of_validation(error))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}; see /v1/models for what is served"
        return response(error.status_code, body(error.status_code, message, code="unknown_url"), error.headers)

    async def on_bug(request: Request, error: Exception) -> Response:
        """Ours. The client gets the id, the log the rest."""
        request_id = request.state.request_id
        service.log.error("a route failed", request=request_id, exception=error)
        tally: Tally | None = getattr(request.state, "tally", None)
        if tally is not None:
            tally.end(Outcome.FAILED)
        failure = body(500, f"internal error; report the request id {request_id}")
        return response(500, failure, {"x-request-id": request_id})  # past the gate, which adds it to others

    handlers: list[tuple[type[Exception], Callable[[Request, Exception], Awaitable[Response]]]] = [
        (RequestError, on_request_error),
        (RequestValidationError, on_invalid),
        (HTTPException, on_http),
        (Exception, on_bug),
    ]
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)


def _log_end(service: ApiService, completion: Completion, finish: str | None) -> None:
    tally = completion.tally
    service.log.info(
        "request ended",
        request=completion.request.request_id,
        finish=finish,
        num_prompt_tokens=len(completion.request.prompt_token_ids),
        num_tokens=tally.num_tokens,
        ttft_s=tally.ttft_ms / 1000,
        elapsed_s=time.monotonic() - tally.arrived_at,
    )


def _log_error(service: ApiService, request_id: str, error: RequestError) -> None:
    """The code only: messages may quote what the client sent."""
    service.log.info("request refused or failed", request=request_id, code=error.status, error=type(error).__name__)

"""The HTTP routes: OpenAI's completions, chat and embeddings, tokens, health, metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Annotated, Any, Final

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import RequestError
from cluster.metrics import CONTENT_TYPE, Outcome
from deploy.answer_writers import AnswerWriter, ChatWriter, CompletionWriter
from deploy.api_keys import ApiKey
from deploy.api_service import ApiService
from deploy.caller import Caller
from deploy.completion import Piece
from deploy.embedding import Embeddings, as_base64
from deploy.gate import Gate
from deploy.generation import Generation
from deploy.json_body import JsonRoute
from deploy.openai_answers import (
    ChatAnswer,
    CompletionAnswer,
    Embedding,
    EmbeddingAnswer,
    EmbeddingUsage,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    Text,
    Tokens,
)
from deploy.openai_errors import UnknownModel, body, body_of, of_validation, outcome_of, response, response_of
from deploy.openai_requests import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from deploy.route_page import add_route_page
from deploy.stream import DONE_EVENT, EventStream, event, unless_gone
from deploy.tally import Tally

__all__ = ["ApiService", "create_app"]

# What the document says of answers beyond their models.
_WITH_ID: Final[dict[str, Any]] = {
    "headers": {"x-request-id": {"description": "The request's own, or a new one", "schema": {"type": "string"}}}
}
_REFUSAL: Final[dict[str, Any]] = {"model": ErrorBody, **_WITH_ID}
_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {200: _WITH_ID, "4XX": _REFUSAL, "5XX": _REFUSAL}
_TEXT: Final[dict[str, Any]] = {"schema": {"type": "string"}}
_STREAMED: Final[dict[int | str, dict[str, Any]]] = {200: {**_WITH_ID, "content": {"text/event-stream": {}}}}
_METRICS: Final[dict[int | str, dict[str, Any]]] = {200: {**_WITH_ID, "content": {"text/plain": _TEXT}}}
_HEALTH: Final[dict[int | str, dict[str, Any]]] = {200: _WITH_ID, 503: {**_WITH_ID, "model": Health}}


def create_app(
    service: ApiService, *, ids_are_echoed: bool = False, replicas: Callable[[], Iterable[str]] = tuple
) -> FastAPI:
    """The app of one ingress replica. Its router must be started on the loop that serves the app.

    `ids_are_echoed`: the server around it answers with the request's x-request-id, as Serve's does. `replicas`: see
    deploy/route_page.py.
    """
    app = FastAPI(title="sluice", docs_url=None, redoc_url=None, responses=_RESPONSES)
    app.router.route_class = JsonRoute
    app.add_middleware(_CancelledCount)
    app.add_middleware(
        Gate,
        api_keys=service.api_keys,
        max_body_bytes=service.limits.max_body_bytes,
        ids_are_echoed=ids_are_echoed,
    )
    _add_errors(app, service)
    add_route_page(app, service.router.route, replicas)

    @app.post("/v1/completions", response_model=CompletionAnswer, responses=_STREAMED)
    async def completions(request: Request, body: Annotated[CompletionRequest, Body()]) -> Response:
        generation = await service.complete(body, _tally(service, request), _caller(service, request))
        writer = CompletionWriter(generation, body, service.model, service.tokenizer)
        return await _answer(service, request, writer, stream=body.stream)

    @app.post("/v1/chat/completions", response_model=ChatAnswer, responses=_STREAMED)
    async def chat(request: Request, body: Annotated[ChatRequest, Body()]) -> Response:
        generation = await service.chat(body, _tally(service, request), _caller(service, request))
        writer = ChatWriter(generation, body, service.model, service.tokenizer)
        return await _answer(service, request, writer, stream=body.stream)

    @app.post("/v1/embeddings", response_model=EmbeddingAnswer)
    async def embeddings(request: Request, body: Annotated[EmbeddingRequest, Body()]) -> Response:
        tally = _tally(service, request)
        return await _embed(service, request, body, await service.embed(body, tally, _caller(service, request)), tally)

    @app.post("/tokenize")
    async def tokenize(body: Annotated[TokenizeRequest, Body()]) -> Tokens:
        return await service.tokenize(body)

    @app.post("/detokenize")
    async def detokenize(body: Annotated[DetokenizeRequest, Body()]) -> Text:
        return service.detokenize(body)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[_card(service)])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        if name != service.model.name:
            raise UnknownModel(f"the model {name!r} does not exist; use {service.model.name!r}", "model")
        return _card(service)

    @app.get("/health", response_model=Health, responses=_HEALTH)
    async def health() -> Response:
        """Progress: a warm plan exists, and each session it needs is open, which a worker that does not step ends."""
        return _health("" if service.router.ready() else service.router.why_not_ready())

    @app.get("/ready", response_model=Health, responses=_HEALTH)
    async def ready() -> Response:
        """Whether this replica would take a request now: healthy, and its queue has room."""
        full = "the queue of this replica is full" if service.router.is_full else ""
        return _health(full if service.router.ready() else service.router.why_not_ready())

    @app.get("/metrics", response_class=Response, responses=_METRICS)
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    return app


def _health(reason: str) -> Response:
    """`reason`: why not."""
    state = Health(status="not ready", reason=reason) if reason else Health(status="ok")
    answer = state.model_dump_json(exclude_none=True)
    return Response(answer, 503 if reason else 200, media_type="application/json")


def _tally(service: ApiService, request: Request) -> Tally:
    """Begins to count the request; whoever ends it finds the tally in its state. Raises Busy at a limit of its key."""
    trace = None
    if service.traces is not None:
        trace = service.traces.begin(request.url.path, request.headers, request.state.request_id)
    request.state.tally = tally = Tally(service.metrics, trace)
    if service.quotas is not None and request.state.api_key is not None:
        tally.charge_to(service.quotas.enter(request.state.api_key))
    return tally


def _caller(service: ApiService, request: Request) -> Caller:
    """The client calls its session something where the configuration names a header for it."""
    session = request.headers.get(service.affinity_header, "") if service.affinity_header else ""
    key: ApiKey | None = request.state.api_key
    return Caller(session=session) if key is None else Caller(key=key, session=session)


def _card(service: ApiService) -> ModelCard:
    model = service.model
    return ModelCard(id=model.name, created=model.created, max_model_len=model.max_model_len)


# ---------------------------------------------------------------- answers


async def _answer(service: ApiService, request: Request, writer: AnswerWriter, *, stream: bool) -> Response:
    """Errors before the first token have a status of their own, so a stream begins with its first token."""
    generation = writer.generation
    if not stream:
        wholes = await unless_gone(generation.collect(), request.receive)
        answer = writer.whole(wholes)
        _log_end(service, generation, wholes[0].finish)
        generation.tally.end(Outcome.OK)
        return Response(answer, media_type="application/json")
    pieces = generation.pieces()
    try:
        first = await unless_gone(anext(pieces), request.receive)  # type: ignore[arg-type]
    except BaseException:
        await pieces.aclose()
        raise
    return _CountedStream(_events(service, writer, first, pieces), pieces, generation.tally)


async def _events(
    service: ApiService, writer: AnswerWriter, first: Piece, pieces: AsyncGenerator[Piece]
) -> AsyncGenerator[bytes]:
    generation = writer.generation
    async with aclosing(pieces):
        try:
            for chunk in writer.chunks(first):
                yield event(chunk)
            finish = first.finish
            async for piece in pieces:
                for chunk in writer.chunks(piece):
                    yield event(chunk)
                finish = piece.finish
        except RequestError as error:  # the status has been sent: the stream says it
            generation.tally.end(outcome_of(error))
            _log_error(service, generation.request_id, error)
            yield event(body_of(error).model_dump_json())
        else:
            last = writer.last()
            if last is not None:
                yield event(last)
            _log_end(service, generation, finish)
            generation.tally.end(Outcome.OK)
        yield DONE_EVENT


async def _embed(
    service: ApiService, request: Request, body: EmbeddingRequest, embeddings: Embeddings, tally: Tally
) -> Response:
    vectors = await unless_gone(embeddings.vectors(), request.receive)
    shown = [as_base64(vector) if body.encoding_format == "base64" else vector.tolist() for vector in vectors]
    num_tokens = embeddings.num_prompt_tokens
    answer = EmbeddingAnswer(
        data=[Embedding(index=index, embedding=vector) for index, vector in enumerate(shown)],
        model=body.model,
        usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )
    tally.end(Outcome.OK)
    return Response(answer.model_dump_json(), media_type="application/json")


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


class _CancelledCount:
    """Serve cancels the task of a request whose client is gone: no handler of errors hears of that."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            tally: Tally | None = scope.get("state", {}).get("tally")
            if tally is not None:
                tally.end(Outcome.CANCELLED)
            raise


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
        remedy = "ask /v1/completions, /v1/chat/completions, /v1/embeddings or /v1/models"
        allowed = (error.headers or {}).get("Allow")
        if allowed is not None:
            remedy = f"use {allowed}"
        message = f"{request.method} {request.url.path[:200]}: {error.detail}; {remedy}"
        code = "unknown_url" if error.status_code == 404 else None
        return response(error.status_code, body(error.status_code, message, code=code), error.headers)

    async def on_bug(request: Request, error: Exception) -> Response:
        """Ours. The client gets the id, the log the rest."""
        request_id = request.state.request_id
        service.log.error("a route failed", request=request_id, exception=error)
        tally: Tally | None = getattr(request.state, "tally", None)
        if tally is not None:
            tally.end(Outcome.FAILED)
        failure = body(500, f"internal error; report the request id {request_id}")
        headers = {} if request.state.id_is_told else {"x-request-id": request_id}  # past the gate
        return response(500, failure, headers)

    handlers: list[tuple[type[Exception], Callable[[Request, Exception], Awaitable[Response]]]] = [
        (RequestError, on_request_error),
        (RequestValidationError, on_invalid),
        (HTTPException, on_http),
        (Exception, on_bug),
    ]
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)


def _log_end(service: ApiService, generation: Generation, finish: str | None) -> None:
    tally = generation.tally
    service.log.info(
        "request ended",
        request=generation.request_id,
        finish=finish,
        num_prompt_tokens=generation.num_prompt_tokens,
        num_tokens=tally.num_tokens,
        ttft_s=tally.ttft_ms() / 1000,
        elapsed_s=time.monotonic() - tally.arrived_at,
    )


def _log_error(service: ApiService, request_id: str, error: RequestError) -> None:
    """The code only: messages may quote what the client sent."""
    service.log.info("request refused or failed", request=request_id, code=error.status, error=type(error).__name__)

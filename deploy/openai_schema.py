"""What OpenAI's API says, as far as sluice does it: requests that refuse what they do not know, and the answers.

Fields of our own: top_k, min_tokens, stop_token_ids, ignore_eos, priority, timeout_s, return_token_ids (the ids
beside the text) and return_route (what happened to the request, in `usage.sluice`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_STOPS = 16
Finish = Literal["stop", "length"]


def _one_prompt(value: object) -> object:
    """A text or a list of token ids; a list with one of those is that one."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(token) is int and 0 <= token < 2**31 for token in value):
        return value
    if isinstance(value, list) and len(value) > 1 and all(isinstance(item, str | list) for item in value):
        raise ValueError(f"{len(value)} prompts in one request are not supported; send one request for each")
    raise ValueError("a text, or a list of token ids that is not empty; send one of the two")


def _stops(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and any(stop == "" for stop in stops):
        raise ValueError("an empty stop string would end everything at once; remove it")
    return stops


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StreamOptions(_Body):
    include_usage: bool = False


class _Sampling(_Body):
    """What both endpoints take. Defaults are OpenAI's."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_stops), Field(max_length=MAX_STOPS)] = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=64)] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    return_token_ids: bool = False
    return_route: bool = False
    user: str | None = None  # taken and ignored

    # Known to OpenAI; only what changes nothing is accepted so far.
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float] | None, Field(max_length=0)] = None

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: object) -> object:
        """0.0 is as neutral as 0."""
        if not isinstance(data, dict):
            return data
        zeros = {key: 0 for key in ("presence_penalty", "frequency_penalty") if data.get(key) == 0.0}
        return {**data, **zeros}

    @model_validator(mode="after")
    def _agree(self) -> _Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true; set it or remove stream_options")
        return self


class CompletionRequest(_Sampling):
    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = 16
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """For a chat template, which knows system but seldom developer."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {"name": self.name} if self.name else {}
        return {"role": "system" if self.role == "developer" else self.role, "content": text, **named}


class ChatRequest(_Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: Literal[False] | None = None


class WorkerRoute(BaseModel):
    name: str
    incarnation: str
    pid: int


class RouteReport(BaseModel):
    """What happened to one request (`return_route`)."""

    request_id: str
    plan: Literal["disaggregated", "aggregated"]
    attempts: int
    prefill: WorkerRoute | None
    """None: nothing was computed remotely."""
    decode: WorkerRoute
    transport: str
    prompt_tokens: int
    prefix_hit_tokens: int
    """In the caches of both workers."""
    decode_prefix_hit_tokens: int
    prefill_prefix_hit_tokens: int
    chunks: int
    blocks: int
    bytes: int
    transfer_s: float
    gb_per_s: float
    local_prefill: bool
    recomputed_tokens: int
    preemptions: int
    spare_used: bool
    queue_s: float
    prefill_s: float
    ttft_ms: float
    itl_ms: float | None
    """Mean time between tokens; None with a single token."""


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None
    sluice: RouteReport | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sluice"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class CompletionChoice(BaseModel):
    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: Finish | None
    token_ids: list[int] | None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: Finish | None
    token_ids: list[int] | None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int = 0
    delta: Delta
    logprobs: None = None
    finish_reason: Finish | None
    token_ids: list[int] | None = None


class Answer(BaseModel):
    """A whole answer or one chunk of a stream; `object` tells which of the four it is."""

    id: str
    object: Literal["text_completion", "chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    choices: list[CompletionChoice] | list[ChatChoice] | list[ChunkChoice]
    usage: Usage | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail

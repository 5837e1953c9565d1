"""What sluice answers, as OpenAI's API says it. Fields of our own: token_ids, prompt_logprobs,
encoder_outputs and usage.sluice."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

Finish = Literal["stop", "length"]
FinishOrCalls = Literal["stop", "length", "tool_calls"]

# ---------------------------------------------------------------- usage


class WorkerRoute(BaseModel):
    name: str
    incarnation: str
    pid: int


class RouteReport(BaseModel):
    """What happened to one request (`return_route`)."""

    request_id: str
    plan: Literal["disaggregated", "aggregated"]
    attempts: int
    prefill: WorkerRoute | None = None
    """None: nothing was computed remotely."""
    decode: WorkerRoute
    transport: str
    prompt_tokens: int
    prefix_hit_tokens: int
    """In the caches of both workers, or fetched from that of another."""
    decode_prefix_hit_tokens: int
    prefill_prefix_hit_tokens: int
    chunks: int
    skipped_blocks: int
    """Of the prompt, that nobody computed: they were in the cache of the worker that computed the rest, or fetched."""
    encoded_by: str | None = None
    """Whose encoder read the prompt; None: no encoder, or its output was in the decode worker's cache."""
    encoder_tokens: int = 0
    """0: the model has no encoder."""
    encoded_blocks: int = 0
    """Of its output, moved to the decode worker."""
    encoded_bytes: int = 0
    encode_ms: float = 0.0
    """Until they were there."""
    fetched_from: str | None = None
    """The worker whose cache was asked for blocks; None: none was."""
    fetched_blocks: int
    fetched_bytes: int
    fetch_ms: float
    blocks: int
    """Moved to the decode worker."""
    bytes: int
    transfer_ms: float
    """With a read to the decode worker in flight."""
    gb_per_s: float
    local_prefill: bool
    recomputed_tokens: int
    preemptions: int
    spare_used: bool
    queue_ms: float
    """Until the prompt was begun, less `fetch_ms`."""
    prefill_ms: float
    ttft_ms: float
    itl_ms: float | None = None
    """Mean time between tokens; None with a single token."""


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """A prompt counts once, whatever the number of its samples; all samples count, also those that best_of drops."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None
    sluice: RouteReport | None = None
    """Of the first sequence."""
    sluice_sequences: list[RouteReport] | None = None
    """Of all, prompt by prompt, where there are several."""


# ---------------------------------------------------------------- models


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sluice"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


# ---------------------------------------------------------------- health


class Health(BaseModel):
    status: Literal["ok", "not ready"]
    reason: str | None = None
    """Where not ready."""


# ---------------------------------------------------------------- logprobs


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """One entry per token; null for the first token of an echoed prompt, which nothing precedes."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Where each token begins in `text`, in characters."""


# ---------------------------------------------------------------- completions


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None
    token_ids: list[int] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    score: float | None = None
    """Of a text that a search found, by which they are ordered: sum of logprobs / length ** length_penalty."""


class EncoderOutput(BaseModel):
    """What the encoder made of a prompt, after its last norm (`return_encoder_output`)."""

    index: int
    """Of the prompt."""
    shape: list[int]
    """Tokens, hidden size."""
    dtype: Literal["float32"]
    data: str
    """Base64, little endian, token by token."""


class CompletionAnswer(BaseModel):
    """A whole answer or one event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    encoder_outputs: list[EncoderOutput] | None = None
    """Of each prompt."""


# ---------------------------------------------------------------- chat


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishOrCalls | None
    token_ids: list[int] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    service_tier: Literal["default"] | None = None
    choices: list[ChatChoice]
    usage: Usage | None = None


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(BaseModel):
    """`id`, `type` and the name come with a call's first piece."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishOrCalls | None
    token_ids: list[int] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    service_tier: Literal["default"] | None = None
    choices: list[ChunkChoice]
    usage: Usage | None = None


# ---------------------------------------------------------------- embeddings, tokens


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """Of length 1; a str is base64 of little-endian float32."""


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class Text(BaseModel):
    prompt: str


# ---------------------------------------------------------------- errors


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail

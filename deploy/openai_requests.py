"""What may be asked: OpenAI's completions, embeddings and tokens, and what its chat shares with them.

Every parameter that OpenAI documents is done, accepted because it changes nothing here, or refused by name; any
other is unknown. Fields of our own: top_k, min_p, repetition_penalty, min_tokens, stop_token_ids, bad_words,
ignore_eos, include_stop_str_in_output, prompt_logprobs, priority, timeout_s, add_special_tokens, return_token_ids
(the ids beside the text), cache_salt and return_route (what happened to the request, in `usage.sluice`). Of models with
an encoder: decoder_prompt, source_language, target_language, return_encoder_output. Of searches: see
deploy/beam_fields.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from deploy.beam_fields import BeamFields
from deploy.openai_chat import ChatMessage
from deploy.request_fields import (
    MAX_LOGPROBS,
    BadWords,
    Biases,
    Body,
    CacheSalt,
    Count,
    DecoderPrompt,
    Int31,
    JsonObject,
    Language,
    Prompts,
    Stops,
    TokenIds,
    each_prompt,
    only,
    refused,
)

_NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Every event tells the usage so far."""
    include_obfuscation: Annotated[Literal[False], only(False, "events are not padded; remove it")] = False

    @model_validator(mode="after")
    def _agree(self) -> StreamOptions:
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("continuous_usage_stats needs include_usage: true; set it or remove both")
        return self


class SamplingRequest(Body):
    """What completions and chat take alike. Defaults are OpenAI's."""

    model: str
    n: Count = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Int31 = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0  # logits stay finite
    logit_bias: Biases = ()
    bad_words: BadWords = Field(default_factory=list)
    min_tokens: Int31 = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stops = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    stop_token_ids: Annotated[list[Int31], Field(max_length=64)] = Field(default_factory=list)
    ignore_eos: bool = False
    prompt_logprobs: _NumLogprobs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    return_token_ids: bool = False
    return_route: bool = False
    cache_salt: CacheSalt | None = None
    user: str | None = None  # says who asks, not what

    @model_validator(mode="after")
    def _agree(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true; set it or remove stream_options")
        return self

    @property
    def num_choices(self) -> int:
        """Told of each prompt."""
        return self.n

    @property
    def num_samples(self) -> int:
        """Generated for each prompt."""
        return self.n

    @property
    def num_found(self) -> int:
        """Texts that one sequence brings."""
        return 1

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to tell with each token; None: no logprobs."""
        return None


class CompletionRequest(SamplingRequest, BeamFields):
    prompt: Prompts
    max_tokens: Int31 = 16
    best_of: Count | None = None
    echo: bool = False
    logprobs: _NumLogprobs | None = None
    suffix: Annotated[Literal[""], only("", "text is not inserted before a suffix; remove it")] = ""
    add_special_tokens: bool = True
    decoder_prompt: DecoderPrompt | None = None
    source_language: Language | None = None
    target_language: Language | None = None
    return_encoder_output: bool = False

    @property
    def prompts(self) -> list[str | TokenIds]:
        return each_prompt(self.prompt)

    @property
    def num_choices(self) -> int:
        return self.num_return_sequences or self.n

    @property
    def num_samples(self) -> int:
        return 1 if self.searches else self.best_of or self.n

    @property
    def num_found(self) -> int:
        return self.num_choices if self.searches else 1

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _fit(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 needs echo: true; ask for a token or for the prompt")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of: {self.best_of} is under n = {self.n}; raise it")
        if self.stream and self.num_samples > self.n:
            raise ValueError("best_of: the best is known at the end only; remove stream or best_of")
        if self.stream and self.return_encoder_output:
            raise ValueError("return_encoder_output: it comes with a whole answer only; remove it or stream")
        return self

    @model_validator(mode="after")
    def _search(self) -> CompletionRequest:
        if not self.searches:
            given = self.model_fields_set & {"length_penalty", "early_stopping", "num_return_sequences"}
            if given:
                raise ValueError(f"{min(given)} needs num_beams of 2 or more; set it or remove {min(given)}")
            return self
        if self.num_return_sequences is not None and "n" in self.model_fields_set and self.n != self.num_choices:
            raise ValueError(f"n: {self.n} is not num_return_sequences = {self.num_choices}; remove one of them")
        if self.num_choices > self.num_beams:
            raise ValueError(f"num_beams: {self.num_beams} do not find {self.num_choices} texts; raise it or lower n")
        if self.stream:
            raise ValueError("num_beams: what a search finds is known at the end only; remove stream or num_beams")
        if self.temperature > 0 and "temperature" in self.model_fields_set:
            raise ValueError(f"temperature: {self.temperature:g} with num_beams, which draws nothing; remove one")
        unfit = {
            "stop": bool(self.stop),
            "best_of": self.best_of is not None,
            "logprobs": self.logprobs is not None,
            "prompt_logprobs": self.prompt_logprobs is not None,
            "max_tokens: 0": self.max_tokens == 0,
        }
        for name, is_given in unfit.items():
            if is_given:
                raise ValueError(f"{name} does not go with num_beams; remove one of them")
        return self


class FormatSchema(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[JsonObject, Field(alias="schema")] = Field(default_factory=dict)
    strict: bool = False


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: FormatSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema, and only with it; change one of the two")
        return self


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: JsonObject = Field(default_factory=dict)
    strict: bool = False


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(SamplingRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: _NumLogprobs | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: JsonObject = Field(default_factory=dict)

    # Nothing changes by these: they name, group or hint.
    metadata: Annotated[dict[str, str], Field(max_length=16)] = Field(default_factory=dict)
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in-memory", "in_memory", "24h"] | None = None
    safety_identifier: str | None = None
    prediction: JsonObject | None = None
    service_tier: Annotated[
        Literal["auto", "default"] | None,
        Field(description="There is one tier; the answer says default."),
    ] = None
    store: Annotated[Literal[False], only(False, "answers are not stored; remove it")] = False
    modalities: Annotated[list[str] | None, only(["text"], "answers are text; remove it")] = None
    verbosity: Annotated[str | None, only("medium", "the model takes no verbosity; say it in a message")] = None
    reasoning_effort: Annotated[
        str | None, only("none", "the model takes no reasoning effort; use chat_template_kwargs if its template does")
    ] = None

    # These would change the answer.
    audio: Annotated[None, refused("answers are text; remove it")] = None
    functions: Annotated[None, refused("it is called tools now; use tools")] = None
    function_call: Annotated[None, refused("it is called tool_choice now; use tool_choice")] = None
    web_search_options: Annotated[None, refused("nothing is searched; remove it")] = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _fit(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true; set it or remove top_logprobs")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message: the last message is not the assistant's; add one or remove it")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools; add some or remove it")
        return self


class EmbeddingRequest(Body):
    """`pooling` is our own: which of the final hidden states make the vector; of an encoder's the mean, if nothing is
    said, else the last."""

    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    pooling: Literal["last", "mean"] | None = None
    add_special_tokens: bool = True
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    cache_salt: CacheSalt | None = None
    user: str | None = None

    @property
    def inputs(self) -> list[str | TokenIds]:
        return each_prompt(self.input)


class TokenizeRequest(Body):
    """One of `prompt` and `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] = Field(default_factory=list)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: JsonObject = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send one of prompt and messages")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[list[Int31], Field(max_length=1 << 20)]

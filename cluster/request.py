"""Plain values about a request that every part agrees on."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from cluster.protos import worker_pb2 as pb


class RequestKey(NamedTuple):
    """A request and the attempt at it: a replay elsewhere is the next attempt."""

    request_id: str
    attempt: int

    @classmethod
    def of(cls, key: pb.RequestKey) -> RequestKey:
        return cls(key.request_id, key.attempt)

    def wire(self) -> pb.RequestKey:
        return pb.RequestKey(request_id=self.request_id, attempt=self.attempt)


class FinishReason(Enum):
    STOP = pb.STOP
    LENGTH = pb.LENGTH
    ERROR = pb.ERROR


class Pooling(Enum):
    """Which final hidden states make the embedding of a prompt."""

    LAST = pb.POOL_LAST
    MEAN = pb.POOL_MEAN


class GrammarKind(Enum):
    JSON_SCHEMA = pb.JSON_SCHEMA  # the text is a schema; {} is any JSON
    REGEX = pb.REGEX
    LARK = pb.LARK  # llguidance's dialect


class Grammar(NamedTuple):
    """What the emitted text must match, whole. Its state is a function of this and the emitted tokens."""

    kind: GrammarKind
    text: str


class TokenLogprobs(NamedTuple):
    """Of the model's raw distribution (log softmax, before penalties and temperature) where one token stands."""

    logprob: float  # of the token itself
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first; as many as asked for

    @classmethod
    def of(cls, logprobs: pb.TokenLogprobs) -> TokenLogprobs:
        return cls(logprobs.logprob, tuple(zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)))

    def wire(self) -> pb.TokenLogprobs:
        return pb.TokenLogprobs(
            logprob=self.logprob,
            top_ids=[token for token, _ in self.top],
            top_logprobs=[logprob for _, logprob in self.top],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What is wanted after the prompt. Together with (prompt, emitted) this determines every token.

    Order of what changes the logits: penalties (repetition, then frequency and presence), bias, what is forbidden
    (bad words, early ends, grammar), temperature, top-k, top-p, min-p.
    """

    max_tokens: int = 16  # counted over all attempts
    min_tokens: int = 0
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # 0: off; relative to the most likely token
    seed: int = 0
    sample: int = 0  # which of the samples of one prompt; draws of the same seed differ by it
    stop_token_ids: tuple[int, ...] = field(default=())
    ignore_eos: bool = False
    presence_penalty: float = 0.0  # over emitted tokens
    frequency_penalty: float = 0.0  # over emitted tokens
    repetition_penalty: float = 1.0  # over prompt and emitted tokens
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added)
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that are never completed
    num_logprobs: int | None = None  # alternatives with each emitted token; 0: its own logprob only; None: off
    num_prompt_logprobs: int | None = None  # the same for prompt tokens from the second on
    grammar: Grammar | None = None
    pooling: Pooling | None = None  # an embedding of the prompt is wanted, no tokens

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    @property
    def needs_history(self) -> bool:
        """Whether the ranks must know every token of the sequence, not only those they compute."""
        asked = self.bad_words or self.grammar is not None or self.num_prompt_logprobs is not None
        return bool(asked) or self.has_penalties

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every prompt position must be computed, cached or not: something is read off its hidden state."""
        return self.num_prompt_logprobs is not None or self.pooling is Pooling.MEAN

    @classmethod
    def of(cls, params: pb.SamplingParams) -> SamplingParams:
        """Raises ValueError for an enum value of a later version."""
        biases = zip(params.logit_bias_ids, params.logit_bias_values, strict=True)
        return cls(
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            seed=params.seed,
            sample=params.sample,
            stop_token_ids=tuple(params.stop_token_ids),
            ignore_eos=params.ignore_eos,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty if params.HasField("repetition_penalty") else 1.0,
            logit_bias=tuple(biases),
            bad_words=tuple(tuple(word.token_ids) for word in params.bad_words),
            num_logprobs=params.num_logprobs if params.HasField("num_logprobs") else None,
            num_prompt_logprobs=params.num_prompt_logprobs if params.HasField("num_prompt_logprobs") else None,
            grammar=Grammar(GrammarKind(params.grammar.kind), params.grammar.text)
            if params.HasField("grammar")
            else None,
            pooling=Pooling(params.pooling) if params.pooling else None,
        )

    def wire(self) -> pb.SamplingParams:
        return pb.SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            sample=self.sample,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias_ids=[token for token, _ in self.logit_bias],
            logit_bias_values=[value for _, value in self.logit_bias],
            bad_words=[pb.BadWord(token_ids=word) for word in self.bad_words],
            num_logprobs=self.num_logprobs,
            num_prompt_logprobs=self.num_prompt_logprobs,
            grammar=None if self.grammar is None else pb.Grammar(kind=self.grammar.kind.value, text=self.grammar.text),
            pooling=pb.POOL_NONE if self.pooling is None else self.pooling.value,
        )

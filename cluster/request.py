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
    """Which final hidden states make the embedding of a prompt, or are wanted as they are."""

    LAST = pb.POOL_LAST
    MEAN = pb.POOL_MEAN
    STATES = pb.POOL_STATES  # all of an encoder's


class GrammarKind(Enum):
    JSON_SCHEMA = pb.JSON_SCHEMA  # the text is a schema; {} is any JSON
    REGEX = pb.REGEX
    LARK = pb.LARK  # llguidance's dialect


class Grammar(NamedTuple):
    """What the emitted text must match, whole. Its state is a function of this and the emitted tokens."""

    kind: GrammarKind
    text: str


class EarlyStopping(Enum):
    """When a search that has found as many texts as it has beams is over (transformers: False, True, "never")."""

    UNLIKELY = pb.STOP_UNLIKELY  # a better one is not to be expected at the length so far
    AT_ONCE = pb.STOP_AT_ONCE
    IMPOSSIBLE = pb.STOP_IMPOSSIBLE  # none that is as long as it may become can be better


class Beams(NamedTuple):
    """A search for the likeliest texts, as transformers does it, instead of draws."""

    num_beams: int  # 2 or more
    num_returned: int = 1  # at most as many
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = EarlyStopping.UNLIKELY


class Hypothesis(NamedTuple):
    """A text that a search found."""

    token_ids: tuple[int, ...]
    score: float  # sum of its logprobs / len(token_ids) ** length_penalty
    finish: FinishReason

    @classmethod
    def of(cls, found: pb.Hypothesis) -> Hypothesis:
        """Raises ValueError for a finish reason of a later version."""
        return cls(tuple(found.token_ids), found.score, FinishReason(found.finish))

    def wire(self) -> pb.Hypothesis:
        return pb.Hypothesis(token_ids=self.token_ids, score=self.score, finish=self.finish.value)


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
    no_repeat_ngram_size: int = 0  # no such many tokens in a row stand twice in prompt + emitted; 0: off
    beams: Beams | None = None  # None: tokens are drawn

    @property
    def num_beams(self) -> int:
        """Rows of a step that it decodes with."""
        return 1 if self.beams is None else self.beams.num_beams

    @property
    def unfit_for_beams(self) -> str | None:
        """A parameter that makes no sense in a search, or whose state cannot be divided between beams."""
        asked = {
            "temperature": self.temperature > 0,
            "logprobs": self.num_logprobs is not None,
            "prompt_logprobs": self.num_prompt_logprobs is not None,
            "grammar": self.grammar is not None,
            "pooling": self.pooling is not None,
        }
        return next((name for name, is_asked in asked.items() if is_asked), None)

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    @property
    def needs_history(self) -> bool:
        """Whether the ranks must know every token of the sequence, not only those they compute."""
        asked = self.bad_words or self.grammar is not None or self.num_prompt_logprobs is not None
        return bool(asked or self.no_repeat_ngram_size) or self.has_penalties

    @property
    def takes_drafts(self) -> bool:
        """Whether the token behind a guess can be drawn before it is known whether the guess is right: nothing but the
        tokens' positions counts, and one token is all that is wanted of a position."""
        wanted = self.beams is not None or self.pooling is not None or self.num_logprobs is not None
        return not (wanted or self.needs_history)

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
            no_repeat_ngram_size=params.no_repeat_ngram_size,
            beams=_beams_of(params.beams) if params.HasField("beams") else None,
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
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            beams=None if self.beams is None else _beams_wire(self.beams),
        )


def _beams_of(beams: pb.Beams) -> Beams:
    if not 1 <= beams.num_returned <= beams.num_beams or beams.num_beams < 2:
        raise ValueError(f"{beams.num_returned} texts of {beams.num_beams} beams")
    early = EarlyStopping(beams.early_stopping)
    return Beams(beams.num_beams, beams.num_returned, beams.length_penalty, early)


def _beams_wire(beams: Beams) -> pb.Beams:
    return pb.Beams(
        num_beams=beams.num_beams,
        num_returned=beams.num_returned,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping.value,
    )

"""What one step does, as plain values: the plan that every rank gets, and the outcome that the stages get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from cluster.errors import WorkerFailed
from cluster.request import FinishReason, Hypothesis, Pooling, SamplingParams, TokenLogprobs
from workers.engine.beam_search import Candidate
from workers.engine.block_manager import BlockRaise
from workers.engine.sequence import Sequence


class Literal(NamedTuple):
    """The tokens at positions start … start + num_tokens − 1."""

    tokens: tuple[int, ...]


class PreviousRow(NamedTuple):
    """The one token that row `row` of the previous plan's `sequences` sampled; it is on the device only."""

    row: int


Inputs: TypeAlias = Literal | PreviousRow


class ScheduledSequence(NamedTuple):
    """One row of the batch: compute the KV of positions start … start + num_tokens − 1 (num_tokens >= 1)."""

    id: int
    start: int
    num_tokens: int
    inputs: Inputs
    sample: bool  # its last position is the last known one: draw the token after it
    appends: tuple[tuple[int, ...], ...]  # per group, blocks added to the table; () if none
    num_drafts: int = 0  # of its literal tokens, the last ones; a token is drawn before each, and behind the last

    @property
    def drafts(self) -> tuple[int, ...]:
        if not self.num_drafts:
            return ()
        assert isinstance(self.inputs, Literal), f"sequence {self.id}: guesses behind a token that is not known"
        return self.inputs.tokens[-self.num_drafts :]


class EncodeRow(NamedTuple):
    """An encoder input to read before the rows of the step, and the blocks of a fixed group that keep its output."""

    id: int
    tokens: tuple[int, ...]
    group: int
    blocks: tuple[int, ...]
    pooling: Pooling | None = None  # what is told of the output


class Projection(NamedTuple):
    """A block of a fixed group with the encoder's output for `num_tokens` tokens: make what decoders read of it."""

    group: int
    block: int
    num_tokens: int


class NewSequence(NamedTuple):
    """First sight of a sequence; the ranks keep all of it until it is finished."""

    id: int
    num_prompt: int
    params: SamplingParams
    extents: tuple[int | None, ...]  # see Sequence
    block_tables: tuple[tuple[int, ...], ...]  # per group, this step's appends included
    history: tuple[int, ...] = ()  # all known tokens, where params.needs_history; later ones come as literals
    forced: tuple[tuple[int, int], ...] = ()  # (position, token): what stands there, whatever would be drawn


class ResumedSequence(NamedTuple):
    """Back after preemption, with other blocks."""

    id: int
    block_tables: tuple[tuple[int, ...], ...]
    history: tuple[int, ...] = ()  # as in NewSequence: tokens may have been added elsewhere


class BlockCopy(NamedTuple):
    """Copy a whole block, all regions and layers, before anything else of the step."""

    group: int
    source: int
    destination: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A delta against what every rank holds. Ranks apply it in this order:

    raises, copies, finished, preempted, new and resumed, encodes, projections, then the rows of `sequences` with their
    appends.
    A plan without rows is legal: it still carries the rest.
    """

    step: int  # rises by one
    sequences: tuple[ScheduledSequence, ...]
    new: tuple[NewSequence, ...] = ()
    resumed: tuple[ResumedSequence, ...] = ()
    finished: tuple[int, ...] = ()  # ids: forget them
    preempted: tuple[int, ...] = ()  # ids: forget their tables, keep their parameters
    raises: tuple[BlockRaise, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    num_tokens: int = 0
    encodes: tuple[EncodeRow, ...] = ()
    projections: tuple[Projection, ...] = ()  # only beside `sequences`
    num_drafts: int = 0  # of num_tokens

    @property
    def computes(self) -> bool:
        """Whether the device has something to do."""
        return bool(self.sequences or self.encodes)


class PromptLogprobs(NamedTuple):
    """Of the prompt tokens from index `first` (>= 1) on; a chunk brings those that its positions predict."""

    first: int
    entries: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the ranks computed, by sequence id. Every row with `sample` has a token, or a vector if it is pooled, or
    is in `failed`."""

    tokens: Mapping[int, int] = field(default_factory=dict)
    runs: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # of rows with drafts instead: one token more
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)  # where params.num_logprobs asks
    prompt_logprobs: Mapping[int, PromptLogprobs] = field(default_factory=dict)  # where it asks, a chunk at a time
    candidates: Mapping[int, tuple[Candidate, ...]] = field(default_factory=dict)  # where params.beams asks; best first
    vectors: Mapping[int, bytes] = field(default_factory=dict)  # float32, little endian, [d], or [S, d] for STATES:
    # where params.pooling asks
    failed: Mapping[int, str] = field(default_factory=dict)  # rows that cannot be sampled, and why; others are well


class SampledToken(NamedTuple):
    seq: Sequence
    token: int
    first_token_index: int  # among the emitted tokens of the request, replays included
    finish: FinishReason | None
    logprobs: TokenLogprobs | None = None


class PooledVector(NamedTuple):
    """The sequence has ended with it, with STOP."""

    seq: Sequence
    vector: bytes


class FinishedSearch(NamedTuple):
    """The sequence has ended with what its search found, best first; with STOP or LENGTH as the best one has."""

    seq: Sequence
    hypotheses: tuple[Hypothesis, ...]


class Chunk(NamedTuple):
    """A piece of known input whose KV is written and may be ticketed."""

    seq: Sequence
    num_confirmed: int  # falls back when the sequence was preempted in between
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(slots=True)
class StepOutcome:
    """What a settled step meant. The blocks of a finished source sequence last until the next `schedule`."""

    step: int
    tokens: list[SampledToken] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    vectors: list[PooledVector] = field(default_factory=list)
    searches: list[FinishedSearch] = field(default_factory=list)
    num_searched_tokens: int = 0  # drawn in all searches: one for each beam
    num_drafted_rows: int = 0  # rows with drafts,
    num_drafts: int = 0  # these,
    num_accepted_drafts: int = 0  # and those of them that were right
    finished: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)  # WAITING again, may be admitted or pulled from now on
    encoded: list[Sequence] = field(default_factory=list)  # FINISHED: they wanted the output of their encoder alone
    failed: list[Sequence] = field(
        default_factory=list
    )  # FINISHED without a reason: the step raised, or their rows did
    error: WorkerFailed | None = None  # why

    def drew(
        self, seq: Sequence, token: int, finish: FinishReason | None, logprobs: TokenLogprobs | None = None
    ) -> None:
        """`token` is the last one that `seq` has now."""
        self.tokens.append(SampledToken(seq, token, seq.num_emitted - 1, finish, logprobs))

"""A step plan in the making."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import NamedTuple

from workers.engine.block_manager import BlockRaise
from workers.engine.projections import Projections
from workers.engine.sequence import Sequence
from workers.engine.step_plan import (
    BlockCopy,
    EncodeRow,
    Literal,
    NewSequence,
    PreviousRow,
    Projection,
    ResumedSequence,
    ScheduledSequence,
    StepPlan,
)

_NO_APPENDS: tuple[tuple[int, ...], ...] = ()


class Launched(NamedTuple):
    """What `settle` has to remember of a plan: its sequences, row by row, and how often each had been preempted."""

    step: int
    rows: list[tuple[Sequence, int]]
    preempted: list[Sequence]
    encoded: list[Sequence]  # those whose output was found, too
    projected: list[tuple[Sequence, Mapping[tuple[int, int], int]]]  # see Projections.settle


class PlanBuilder:
    """Collects rows under a token budget. Rows keep their order; a victim of preemption loses its row."""

    __slots__ = (
        "budget",
        "copies",
        "drafts",
        "encoded",
        "encoder_budget",
        "found",
        "preempted",
        "projections",
        "rows",
        "stalled",
    )

    def __init__(self, budget: int, encoder_budget: int, projections: Projections) -> None:
        self.budget = budget
        self.projections = projections
        self.encoder_budget = encoder_budget
        self.encoded: list[Sequence] = []
        self.found: list[Sequence] = []  # only encode, and what they want is cached
        self.rows: dict[int, tuple[Sequence, int]] = {}
        self.copies: dict[int, list[BlockCopy]] = {}  # of forks, by the sequence that they are for
        self.drafts: dict[int, tuple[int, ...]] = {}  # by sequence; added when nobody is preempted any more
        self.preempted: list[Sequence] = []
        self.stalled = False  # somebody who runs found no blocks

    def add(self, seq: Sequence, num_tokens: int) -> None:
        self.rows[seq.id] = (seq, num_tokens)
        self.budget -= num_tokens

    def draft(self, seq: Sequence, drafts: tuple[int, ...]) -> None:
        """Behind the one known token of its row."""
        self.drafts[seq.id] = drafts
        self.add(seq, 1 + len(drafts))
        self.budget += 1  # of that token, which was paid for

    def encode(self, seq: Sequence, num_tokens: int) -> None:
        self.encoded.append(seq)
        self.encoder_budget -= num_tokens

    def preempt(self, seq: Sequence) -> None:
        for each in (seq, *seq.beams):
            entry = self.rows.pop(each.id, None)
            if entry is not None:
                self.budget += entry[1]
            self.copies.pop(each.id, None)
        self.preempted.append(seq)

    def build(self, step: int, finished: Iterable[int], raises: Iterable[BlockRaise]) -> tuple[StepPlan, Launched]:
        """The plan, and the rows' sequences moved on as if it had been computed."""
        scheduled: list[ScheduledSequence] = []
        new: list[NewSequence] = []
        resumed: list[ResumedSequence] = []
        launched: list[tuple[Sequence, int]] = []
        projected: list[tuple[Sequence, list[Projection]]] = []  # who is the first to read what
        num_total = 0
        for seq, num_tokens in self.rows.values():
            start = seq.num_computed
            end = start + num_tokens
            tokens = seq.tokens
            known = len(tokens)
            drafts = self.drafts.get(seq.id, ())
            if start == known:
                inputs = PreviousRow(seq.row)
            elif num_tokens == 1:
                inputs = Literal((tokens[start],))
            else:
                inputs = Literal((*tokens[start:end], *drafts))
            appends = _NO_APPENDS
            if not seq.is_table_sent:
                _introduce(seq, new, resumed)
                if lacking := self.projections.lacking(seq):
                    projected.append((seq, lacking))
            elif seq.fresh is not None:
                appends = tuple(map(tuple, seq.fresh))
            seq.fresh = None
            sample = end >= known
            if sample:
                seq.num_pending += 1 + len(drafts)
            seq.num_computed = end
            seq.last_step = step
            seq.row = len(scheduled)
            num_total += num_tokens
            scheduled.append(ScheduledSequence(seq.id, start, num_tokens, inputs, sample, appends, len(drafts)))
            launched.append((seq, seq.num_preemptions))
        preempted = tuple(seq.id for seq in self.preempted if seq.is_table_sent)
        for seq in self.preempted:
            seq.is_table_sent = False
        plan = StepPlan(
            step=step,
            sequences=tuple(scheduled),
            new=tuple(new),
            resumed=tuple(resumed),
            finished=tuple(finished),
            preempted=preempted,
            raises=tuple(raises),
            copies=tuple(chain.from_iterable(self.copies.values())),
            num_tokens=num_total,
            encodes=tuple(_encode_row(seq, step) for seq in self.encoded),
            projections=tuple(dict.fromkeys(each for _, lacking in projected for each in lacking)),
            num_drafts=sum(map(len, self.drafts.values())),
        )
        trusted = [(seq, self.projections.of(lacking)) for seq, lacking in projected]
        return plan, Launched(step, launched, self.preempted, self.encoded + self.found, trusted)


def _encode_row(seq: Sequence, step: int) -> EncodeRow:
    assert seq.encoder_input is not None
    seq.last_step = step
    return EncodeRow(seq.id, seq.encoder_input.tokens, *seq.output_blocks(), seq.params.pooling)


def _introduce(seq: Sequence, new: list[NewSequence], resumed: list[ResumedSequence]) -> None:
    tables = tuple(map(tuple, seq.block_tables))
    history = tuple(seq.tokens) if seq.needs_history else ()
    if seq.is_known_to_ranks:
        resumed.append(ResumedSequence(seq.id, tables, history))
    else:
        new.append(NewSequence(seq.id, seq.num_prompt, seq.params, seq.extents, tables, history, _forced(seq)))
        seq.is_known_to_ranks = True
    seq.is_table_sent = True


def _forced(seq: Sequence) -> tuple[tuple[int, int], ...]:
    second, last = seq.forced
    forced = [(1, second)] if second is not None and seq.num_prompt == 1 else []
    if last is not None:
        forced.append((seq.forced_end, last))
    return tuple(forced)

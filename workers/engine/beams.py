"""The sequences of searches: one for each beam, forked from each other as the search goes on.

A sequence that searches computes its prompt as others do, and then leads: it draws nothing itself, keeps its prompt's
blocks, and takes `num_rows` rows of a step for its beams, which are sequences that nobody else sees. They share all
full blocks and those of fixed groups; a partial block is copied when a second beam goes on from it. The first beam that
goes on from another is that one, with a token more. What the search knows (tokens, scores, texts it has found) outlives
a preemption: the beams are then forked from the recomputed prompt and compute what they had beyond it. Engine thread
only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from cluster.request import FinishReason
from workers.engine.beam_search import BeamSearch, Branch, Candidate
from workers.engine.block_tables import BlockTables
from workers.engine.plan_builder import PlanBuilder
from workers.engine.scheduler_limits import SchedulerLimits
from workers.engine.sequence import Sequence, SequenceStatus
from workers.engine.step_plan import BlockCopy, FinishedSearch, StepOutcome


@dataclass(slots=True)
class _Search:
    leader: Sequence
    rules: BeamSearch
    sources: dict[int, Sequence] = field(default_factory=dict)  # by beam without blocks: what it is forked from
    heard: dict[int, tuple[Candidate, ...]] = field(default_factory=dict)  # by beam, of the running step


class Beams:
    """Of one shard."""

    def __init__(
        self, tables: BlockTables, limits: SchedulerLimits, eos_token_ids: frozenset[int], ended: list[int]
    ) -> None:
        """ended: where ids go that the ranks may forget."""
        self._tables = tables
        self._limits = limits
        self._eos_token_ids = eos_token_ids
        self._ended = ended
        self._searches: dict[int, _Search] = {}  # by leader, and by each of its beams
        self._ids = itertools.count(-1, -1)  # nobody else gives negative ones

    def begin(self, seq: Sequence) -> None:
        """A sequence is accepted; its length is known."""
        beams = seq.params.beams
        if seq.num_rows > 1 and beams is not None:
            eos = frozenset() if seq.params.ignore_eos else self._eos_token_ids
            max_new_tokens = seq.max_total_tokens - seq.num_prompt
            rules = BeamSearch(beams, eos.union(seq.params.stop_token_ids), max_new_tokens)
            self._searches[seq.id] = _Search(seq, rules)

    def leader_of(self, seq: Sequence) -> Sequence:
        """Itself, if it is no beam."""
        search = self._searches.get(seq.id)
        return seq if search is None else search.leader

    def leader_id(self, id_: int) -> int:
        search = self._searches.get(id_)
        return id_ if search is None else search.leader.id

    def members(self) -> Iterator[Sequence]:
        """All beams of all searches."""
        return (
            beam for id_, search in self._searches.items() if id_ == search.leader.id for beam in search.leader.beams
        )

    # ------------------------------------------------------------------ a step

    def remaining(self, seq: Sequence) -> int:
        """Tokens that the beam has to compute which lacks most."""
        return max((len(beam.tokens) - beam.num_computed for beam in seq.beams), default=0)

    def needed(self, seq: Sequence) -> list[int] | None:
        """Blocks per group that rows for all beams take; None: nothing is to be computed now."""
        due = [beam for beam in seq.beams if beam.num_computed < len(beam.tokens)]
        if not due or seq.num_confirmed < len(seq.tokens):
            return None
        sources = self._searches[seq.id].sources
        needed = [0] * len(seq.block_tables)
        for beam in due:
            end = len(beam.tokens)
            if beam.id in sources:
                full = sources[beam.id].num_confirmed // self._tables.block_size
                totals = self._tables.totals(seq, end)
                missing = [total - full if seq.grows(group) else 0 for group, total in enumerate(totals)]
            else:
                missing = self._tables.missing(beam, end)
            needed = [have + more for have, more in zip(needed, missing, strict=True)]
        return needed

    def add_rows(self, seq: Sequence, batch: PlanBuilder, step: int) -> None:
        """There is room for all beams; they get rows as far as the budget goes."""
        sources = self._searches[seq.id].sources
        for beam in seq.beams:
            source = sources.pop(beam.id, None)
            if source is not None:
                batch.copies[beam.id] = [BlockCopy(*copy) for copy in self._tables.fork(source, beam)]
                source.last_step = beam.last_step = step
        for beam in seq.beams:
            end = len(beam.tokens)
            if beam.capacity < end:
                grown = self._tables.grow(beam, end)
                assert grown, f"{beam} finds no room"
            num_tokens = min(end - beam.num_computed, self._limits.chunk_tokens, batch.budget)
            if num_tokens > 0:
                batch.add(beam, num_tokens)

    def heard(
        self, seq: Sequence, candidates: tuple[Candidate, ...], outcome: StepOutcome
    ) -> tuple[Sequence, FinishReason | None]:
        """What may follow a leader's prompt or a beam. With the last one of a step the search goes on, or ends: then
        its leader, and why."""
        search = self._searches[seq.id]
        leader = search.leader
        if seq is leader:
            if leader.beams:
                return seq, None  # it was recomputed
            parents, offered = [leader], [candidates]
        else:
            search.heard[seq.id] = candidates
            if len(search.heard) < len(leader.beams):
                return seq, None
            parents, offered = leader.beams, [search.heard.pop(beam.id) for beam in leader.beams]
        texts = [parent.tokens[leader.num_prompt :] for parent in parents]
        branches = search.rules.advance(texts, offered)
        outcome.num_searched_tokens += leader.num_rows
        if not branches:
            found = FinishedSearch(leader, tuple(search.rules.hypotheses))
            outcome.searches.append(found)
            return leader, found.hypotheses[0].finish
        leader.beams = self._branch(search, parents, branches)
        return seq, None

    # ------------------------------------------------------------------ the end

    def preempt(self, seq: Sequence) -> None:
        """Its beams give their blocks back, and are to be forked from its prompt again."""
        for beam in seq.beams:
            self._tables.drop(beam)
            beam.num_preemptions += 1
            self._forget(beam)
            self._searches[seq.id].sources[beam.id] = seq

    def end(self, seq: Sequence) -> None:
        """It has ended, and its beams with it."""
        if self._searches.pop(seq.id, None) is not None:
            for beam in seq.beams:
                beam.last_step = max(beam.last_step, seq.last_step)
                self._end(beam)
            seq.beams = []

    def _end(self, beam: Sequence) -> None:
        del self._searches[beam.id]
        self._tables.drop(beam)
        self._forget(beam)
        beam.enter(SequenceStatus.FINISHED)

    def _forget(self, beam: Sequence) -> None:
        if beam.is_known_to_ranks:
            self._ended.append(beam.id)
        beam.is_known_to_ranks = beam.is_table_sent = False

    # ------------------------------------------------------------------ branching

    def _branch(self, search: _Search, parents: SequenceOf[Sequence], branches: SequenceOf[Branch]) -> list[Sequence]:
        leader = search.leader
        continued: set[int] = set()  # parents that are a beam of the next step, too
        beams: list[Sequence] = []
        for number, _, _ in branches:
            parent = parents[number]
            if parent is not leader and number not in continued:
                continued.add(number)
                beams.append(parent)
                continue
            beam = self._child(leader, parent)
            self._searches[beam.id] = search
            search.sources[beam.id] = search.sources.get(parent.id, parent)
            beams.append(beam)
        for beam, branch in zip(beams, branches, strict=True):
            beam.tokens.append(branch.token)
        for number, parent in enumerate(parents):
            if parent is not leader and number not in continued:
                search.sources.pop(parent.id, None)
                self._end(parent)
        return beams

    def _child(self, leader: Sequence, parent: Sequence) -> Sequence:
        child = Sequence(
            next(self._ids),
            leader.key,
            list(parent.tokens),
            leader.num_prompt,
            leader.params,
            arrival=leader.arrival,
            priority=leader.priority,
            hashes=parent.hashes,
            chain_root=leader.chain_root,
            extents=leader.extents,
            encoder_input=leader.encoder_input,
            forced=leader.forced,
        )
        child.num_known = 0  # nothing of it is told of as a prompt
        child.forced_end, child.max_total_tokens = leader.forced_end, leader.max_total_tokens
        child.enter(SequenceStatus.RUNNING)
        return child

"""Which tokens the next step computes, and whose blocks pay for it.

One token budget, no phases: sequences that decode take one token each, the rest goes to chunks of known input, in
the order of priority and arrival. Admission never preempts; growth preempts the latest-arrived of the lowest
priority by recompute. Sequences that pull are never victims, and pinned blocks stay whatever happens to their
sequence. Knows groups, never model types. Engine thread only.
"""

from __future__ import annotations

from collections import deque

from cluster.request import FinishReason
from workers.engine.beams import Beams
from workers.engine.block_manager import BlockManager
from workers.engine.block_tables import BlockTables
from workers.engine.drafts import Drafts
from workers.engine.encodes import Encodes
from workers.engine.plan_builder import Launched, PlanBuilder
from workers.engine.pulls import PullReservation, Pulls
from workers.engine.scheduler_limits import SchedulerLimits
from workers.engine.sequence import Sequence, SequenceQueue, SequenceStatus
from workers.engine.step_plan import Chunk, PooledVector, StepOutcome, StepPlan, StepResult
from workers.speculative.proposer import Proposer


class Scheduler:
    """Queues, sequences and the making of plans for one shard.

    A sequence is given in by `add` (compute here) or `reserve_for_pull` (somebody else computes). Either raises
    RequestTooLong or InvalidRequest for a request that could never be served. At most two plans are unsettled.
    """

    def __init__(
        self,
        blocks: BlockManager,
        limits: SchedulerLimits,
        chain_root: bytes,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        proposer: Proposer | None = None,
    ) -> None:
        self._blocks = blocks
        self._limits = limits
        self._eos_token_ids = eos_token_ids
        self._tables = BlockTables(blocks, chain_root)
        self._pulls = Pulls(blocks, self._tables, limits)
        self._encodes = Encodes(blocks, self._tables, limits)
        self._sequences: dict[int, Sequence] = {}  # everything not finished
        self._waiting = SequenceQueue()
        self._running = SequenceQueue()
        self._blocked: Sequence | None = None  # head of the queue that found no room; later ones do not pass it
        self._lingering: list[Sequence] = []  # finished sources whose blocks the stage may still lease
        self._ended: list[int] = []  # ids that the ranks may forget
        self._beams = Beams(self._tables, limits, eos_token_ids, self._ended)
        self._drafts = Drafts(proposer, eos_token_ids)
        self._launched: deque[Launched] = deque()
        self._step = 0

    # ------------------------------------------------------------------ counts

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)  # for computing here; parked sequences are the stage's to count

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_pulling(self) -> int:
        return len(self._pulls)

    @property
    def queued_prefill_tokens(self) -> int:
        """Known input that has no KV yet, here and to be computed here. O(sequences)."""
        waiting = sum(len(seq.tokens) for seq in self._waiting)
        return waiting + sum(max(0, seq.num_known - seq.num_computed) for seq in self._running)

    @property
    def has_work(self) -> bool:
        """Whether `schedule` may have something to do or to clean up."""
        return bool(self._running or self._waiting or self._lingering or self._encodes.num_reading)

    # ------------------------------------------------------------------ in and out

    def check(self, seq: Sequence) -> None:
        """Raises RequestTooLong or InvalidRequest if the sequence could never finish here."""
        self._limits.check(seq, self._blocks.groups)

    def add(self, seq: Sequence) -> None:
        """Queues a new or parked sequence to be computed here. Its prefix is looked up when it is admitted."""
        assert seq.status is SequenceStatus.WAITING and not seq.is_queued, f"{seq} cannot be queued"
        self._accept(seq)
        self._enqueue(seq)

    def park(self, seq: Sequence) -> None:
        """Takes a WAITING sequence out of the queue, if it is there: `add` or `reserve_for_pull` bring it back."""
        assert seq.status is SequenceStatus.WAITING, f"{seq} cannot be parked"
        if seq.is_queued:
            self._dequeue(seq)

    def abort(self, seq: Sequence, fence: int = 0) -> None:
        """Ends it in any state; idempotent. Its blocks carry the fence of the last step that may touch them."""
        if not seq.is_finished:
            seq.last_step = max(seq.last_step, fence)
            self._finish(seq, None)

    def abort_plan(self, plan: StepPlan) -> list[Sequence]:
        """Its step failed: ends every sequence that has a row in it. To be settled next, with nothing sampled."""
        ids = dict.fromkeys(self._beams.leader_id(row.id) for row in (*plan.sequences, *plan.encodes))
        failed = [seq for id_ in ids if (seq := self._sequences.get(id_)) is not None]
        for seq in failed:
            self.abort(seq)
        return failed

    def append_token(self, seq: Sequence, token: int) -> FinishReason | None:
        """A handoff: a token that the source sampled becomes known input. Says whether the stream ends with it;
        the stage then aborts the sequence, which moves nothing more. PULLING or parked sequences only."""
        assert seq.status in (SequenceStatus.PULLING, SequenceStatus.WAITING) and not seq.is_queued, f"{seq}"
        return seq.accept(token, self._eos_token_ids)

    def _accept(self, seq: Sequence) -> None:
        if seq.max_total_tokens == 0:
            self.check(seq)
            seq.max_total_tokens, seq.forced_end = self._limits.max_total_tokens(seq), self._limits.last_position(seq)
            self._sequences[seq.id] = seq
            self._beams.begin(seq)

    def _enqueue(self, seq: Sequence) -> None:
        seq.is_queued = True
        self._waiting.insert(seq)

    def _dequeue(self, seq: Sequence) -> None:
        seq.is_queued = False
        self._waiting.remove(seq)
        if self._blocked is seq:
            self._blocked = None

    def _finish(self, seq: Sequence, reason: FinishReason | None) -> None:
        match seq.status:
            case SequenceStatus.RUNNING:
                self._running.remove(seq)
            case SequenceStatus.PULLING:
                self._pulls.remove(seq)
            case _ if seq.is_queued:
                self._dequeue(seq)
        self._encodes.forget(seq)
        self._beams.end(seq)
        self._drafts.forget(seq)
        seq.enter(SequenceStatus.FINISHED)
        seq.finish = reason
        self._sequences.pop(seq.id, None)
        if seq.is_known_to_ranks:
            self._ended.append(seq.id)
        if (seq.stop_after_first or seq.only_encodes) and reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._lingering.append(seq)
        else:
            self._tables.drop(seq)

    # ------------------------------------------------------------------ pulls

    def reserve_for_pull(self, seq: Sequence) -> PullReservation | None:
        """WAITING (new, parked or queued) -> PULLING: cached blocks are taken, the rest reserved as destinations.

        None: no room now, try again after the next step; meanwhile nobody later is admitted before it.
        Raises as `add` does, and RequestTooLong if pulls may never hold that much: it can only be computed here.
        """
        assert seq.status is SequenceStatus.WAITING, f"{seq} cannot pull"
        if seq.id not in self._sequences:
            self.check(seq)
        self._limits.check_pull(seq, self._blocks.groups)
        self._accept(seq)
        assert not self._encodes.lacks(seq), f"{seq}: the output of its encoder comes first"
        if seq.is_unreported:
            return None  # a step in flight may still bring one of its tokens
        if self._blocked is not None and self._blocked.order < seq.order:
            return None
        # As many again as run may be on their way: a slot must not idle while its next user waits for bytes.
        if len(self._running) + len(self._pulls) >= 2 * self._limits.max_sequences:
            return None
        reservation = self._pulls.reserve(seq)
        if reservation is not None:
            self._encodes.forget(seq)
            if seq.is_queued:
                self._dequeue(seq)
            seq.enter(SequenceStatus.PULLING)
        return reservation

    def pull_done(self, seq: Sequence, num_valid_tokens: int) -> None:
        """PULLING -> RUNNING: the KV of the first `num_valid_tokens` tokens has arrived, the rest is recomputed.

        Destination blocks beyond them are given back (a read that is still posted keeps its pins on them).
        """
        assert seq.status is SequenceStatus.PULLING, f"{seq} does not pull"
        self._pulls.remove(seq)
        self._tables.keep(seq, num_valid_tokens)
        seq.enter(SequenceStatus.RUNNING)
        self._running.insert(seq)

    def release_pull(self, seq: Sequence) -> None:
        """PULLING -> WAITING, parked: it waited too long for its source; its blocks are given back."""
        assert seq.status is SequenceStatus.PULLING, f"{seq} does not pull"
        self._pulls.remove(seq)
        self._tables.drop(seq)
        seq.enter(SequenceStatus.WAITING)

    def lacks_output(self, seq: Sequence) -> bool:
        """Whether its encoder input must be read, here or elsewhere, before it can be admitted or pulled."""
        return self._encodes.lacks(seq)

    def reserve_output(self, seq: Sequence) -> PullReservation | None:
        """WAITING and parked -> ENCODING: blocks for what its encoder makes elsewhere. None: no room now, or the output
        of an equal input is on its way already. Raises as `add`."""
        assert not seq.is_queued, f"{seq} is to be encoded here"
        self._limits.check_output_pull(seq, self._blocks.groups)
        self._accept(seq)
        return None if seq.is_unreported else self._encodes.reserve(seq)

    def output_done(self, seq: Sequence, *, is_here: bool) -> None:
        """ENCODING -> WAITING, parked: the output has arrived, or its blocks are given back."""
        self._encodes.landed(seq, is_here=is_here)

    # ------------------------------------------------------------------ the plan

    def schedule(self) -> StepPlan:
        """The next plan; its tokens count as computed from now on."""
        assert len(self._launched) < 2, "two plans are unsettled"
        self._step += 1
        for seq in self._lingering:
            self._tables.drop(seq)
        self._lingering.clear()
        batch = PlanBuilder(self._limits.max_batched_tokens, self._limits.max_encoder_tokens, self._encodes.projections)
        self._advance(batch)
        self._admit(batch)
        self._drafts.add(batch)
        plan, launched = batch.build(self._step, self._ended, self._blocks.drain_raises())
        self._ended.clear()
        self._launched.append(launched)
        return plan

    def _advance(self, batch: PlanBuilder) -> None:
        """Rows for what runs: single tokens first, then chunks, both in order."""
        chunks: list[Sequence] = []
        for seq in self._running.first(self._limits.max_sequences):
            computed, known = seq.num_computed, len(seq.tokens)
            remaining = known + seq.num_pending - computed
            if seq.num_rows > 1 and known == computed:
                remaining = self._beams.remaining(seq)
            if remaining > 1:
                chunks.append(seq)
            elif remaining and seq.beams and known == computed:
                self._search(seq, batch)
            elif remaining == 1 and seq.status is SequenceStatus.RUNNING:
                is_last = known == computed and (known + 1 >= seq.max_total_tokens or seq.needs_history)
                if is_last or computed > known:
                    continue  # the token in flight is its last, or it or drafts must be judged before the next is drawn
                if computed < seq.capacity or self._grow(seq, computed + 1, batch):
                    batch.add(seq, 1)
        for seq in chunks:
            if batch.budget <= 0 or seq.status is not SequenceStatus.RUNNING:
                continue
            if seq.num_computed == len(seq.tokens):
                self._search(seq, batch)
            else:
                num_tokens = self._limits.chunk(seq, batch.budget, self._tables.block_size)
                if self._grow(seq, seq.num_computed + num_tokens, batch):
                    batch.add(seq, num_tokens)

    def _search(self, seq: Sequence, batch: PlanBuilder) -> None:
        """Rows for its beams, all of them or none."""
        needed = self._beams.needed(seq) if seq.status is SequenceStatus.RUNNING else None
        if needed is not None and (self._blocks.can_reserve(needed) or self._make_room(seq, needed, batch)):
            self._beams.add_rows(seq, batch, self._step)

    def _grow(self, seq: Sequence, end: int, batch: PlanBuilder) -> bool:
        """Room for the first `end` tokens, if need be at the cost of those behind it. False: it sits this step out."""
        if end <= seq.capacity or self._tables.grow(seq, end):
            return True
        return self._make_room(seq, self._tables.missing(seq, end), batch) and self._tables.grow(seq, end)

    def _make_room(self, seq: Sequence, needed: list[int], batch: PlanBuilder) -> bool:
        victims = self._tables.victims(needed, [other for other in self._running if other.order > seq.order][::-1])
        if victims is None:
            batch.stalled = True  # what it lacks is held by pulls, leases or quarantine: they end on their own
            return False
        for victim in victims:
            batch.preempt(victim)
            self._preempt(victim)
        assert self._blocks.can_reserve(needed), f"{seq} found no room after preempting {victims}"
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._beams.preempt(seq)
        self._tables.drop(seq)
        seq.num_preemptions += 1
        seq.is_unreported = True
        seq.enter(SequenceStatus.WAITING)
        self._enqueue(seq)

    def _admit(self, batch: PlanBuilder) -> None:
        """First chunks of those that wait, strictly in order: whoever finds no room blocks the ones behind."""
        claim = self._pulls.take_claim()
        self._blocked = None
        while (seq := self._waiting.head()) is not None and batch.budget > 0:
            if claim is not None and claim < seq.order:
                return
            if not self._begin(seq, batch):
                self._blocked = seq
                return

    def _begin(self, seq: Sequence, batch: PlanBuilder) -> bool:
        """Has its encoder input read, no further ahead than there are rows for, or its first chunk computed."""
        num_rows = self._running.num_rows + seq.num_rows
        if self._encodes.lacks(seq):
            num_rows += self._encodes.num_reading
            if seq.is_unreported or num_rows > self._limits.max_sequences or not self._encodes.start(seq, batch):
                return False
            self._dequeue(seq)
        elif seq.only_encodes:
            self._dequeue(seq)
            self._encodes.find(seq, batch)
        else:
            may = not (batch.preempted or batch.stalled or seq.is_unreported) and num_rows <= self._limits.max_sequences
            while may and not self._tables.admit(seq, num_running=len(self._running)):
                may = seq.encoder_input is None and self._encodes.take_back(seq)  # else it has its output's blocks
            if not may:
                return False
            self._dequeue(seq)
            self._encodes.forget(seq)
            seq.enter(SequenceStatus.RUNNING)
            self._running.insert(seq)
            batch.add(seq, self._limits.chunk(seq, batch.budget, self._tables.block_size))
        return True

    # ------------------------------------------------------------------ the outcome

    def settle(self, plan: StepPlan, result: StepResult) -> StepOutcome:
        """The step's event has passed: confirms tokens, registers full blocks, applies stop conditions.

        Tokens of sequences that ended meanwhile are dropped; rows that failed end theirs. Plans settle in order.
        """
        launched = self._launched.popleft()
        assert launched.step == plan.step, f"plan {plan.step} settled before plan {launched.step}"
        self._blocks.retire_fences(plan.step)
        outcome = StepOutcome(plan.step)
        for row, (seq, num_preemptions) in zip(plan.sequences, launched.rows, strict=True):
            if seq.status is SequenceStatus.FINISHED:
                continue
            if row.id in result.failed:  # before its blocks could be registered: what they hold is not to be hit
                outcome.failed.append(self._beams.leader_of(seq))
                self._finish(outcome.failed[-1], None)
                continue
            end, finish = row.start + row.num_tokens, None
            if row.num_drafts:
                finish = self._drafts.settle(seq, row, result.runs[row.id], outcome)
                end = len(seq.tokens) - 1
            if seq.num_preemptions == num_preemptions:  # else its blocks are gone, but the tokens are good
                seq.num_computed -= row.start + row.num_tokens - end
                self._tables.confirm(seq, end)
                if row.start < seq.num_known:
                    outcome.chunks.append(Chunk(seq, min(end, seq.num_known), result.prompt_logprobs.get(row.id)))
            if row.sample and not row.num_drafts:
                seq.num_pending -= 1
                if seq.params.pooling is not None:
                    finish = FinishReason.STOP
                    outcome.vectors.append(PooledVector(seq, result.vectors[row.id]))
                elif seq.num_rows > 1:
                    seq, finish = self._beams.heard(seq, result.candidates[row.id], outcome)
                else:
                    finish = seq.accept(token := result.tokens[row.id], self._eos_token_ids)
                    outcome.drew(seq, token, finish, result.logprobs.get(row.id))
            if finish is not None:
                self._finish(seq, finish)
                outcome.finished.append(seq)
        self._encodes.projections.settle(launched.projected)
        for seq in (each for each in launched.encoded if each.status is SequenceStatus.ENCODING):
            self._encodes.done(seq)
            if seq.only_encodes:
                self._finish(seq, FinishReason.STOP)
                outcome.encoded.append(seq)
            else:
                self._enqueue(seq)
        outcome.vectors += [PooledVector(seq, result.vectors[seq.id]) for seq in outcome.encoded if seq.params.pooling]
        for seq in launched.preempted:
            seq.is_unreported = False
        outcome.preempted += [seq for seq in launched.preempted if seq.status is SequenceStatus.WAITING]
        return outcome

    def check_integrity(self) -> None:
        """Asserts that queues, statuses and block references agree. O(everything): for tests and debugging."""
        self._blocks.check_integrity()
        running, waiting = list(self._running), list(self._waiting)
        for seq in self._sequences.values():
            seq.check_integrity(is_running=seq in running, is_waiting=seq in waiting, is_pulling=seq in self._pulls)
        self._tables.check_integrity([*self._sequences.values(), *self._lingering, *self._beams.members()])
        self._pulls.check_integrity()
        self._encodes.check_integrity()

"""Random workloads over tiny pools: computing, pulling and source sequences, aborts, lost reads, ended sessions.

The rank of these tests has block memory instead of a model, so a block that is shared wrongly, written twice or
reused too early shows as a wrong history; and tokens depend on the history alone, so a token that is lost, doubled
or resampled shows in what was emitted.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.errors import RequestTooLong
from cluster.request import SamplingParams
from kvtransfer.ledger import BlockRef, Ledger
from tests.support.engine_builders import EOS, EngineDouble, Foresight, expected_tokens, histories, next_token
from workers.engine.block_manager import GroupCapacity
from workers.engine.scheduler import PullReservation
from workers.engine.sequence import Sequence, SequenceStatus
from workers.engine.step_plan import StepOutcome

STEMS = [list(range(1, 17)), [7] * 12, list(range(20, 30))]  # prompts share these, so that prefixes are hit
ENCODER_INPUTS = [(5,) * 3, (6,) * 8, (7,) * 17]  # 1, 2 and 5 blocks of 6
MAX_MODEL_LEN = 24


@dataclass
class Case:
    """A request as the test knows it."""

    seq: Sequence
    prompt: list[int]
    expected: list[int]
    aborted: bool = False
    reservation: PullReservation | None = None
    asked: tuple[int, ...] = ()  # what the source was asked to compute


class Workload(RuleBasedStateMachine):
    overlapped = False

    def __init__(self) -> None:
        super().__init__()
        self.cases: list[Case] = []
        self.parked: list[Case] = []  # with the stage: neither queued nor pulling
        self.pulling: list[Case] = []
        self.leased: dict[int, dict[int, tuple[int, int]]] = {}  # sequence -> {position: block and how many of its
        # tokens} that a reader was told of
        self.finished: set[int] = set()
        self.now = 0.0
        self.pull_id = 0
        self.late_pulls: list[tuple[int, bool]] = []

    @initialize(
        num_blocks=st.integers(5, 10),
        reserve=st.sampled_from([0.0, 0.3]),
        cache=st.booleans(),
        wrong_every=st.sampled_from([0, 1, 3, 100]),
    )
    def build(self, num_blocks: int, reserve: float, cache: bool, wrong_every: int) -> None:
        self.engine = EngineDouble(
            num_blocks,
            4,
            max_batched_tokens=12,
            max_sequences=3,
            max_model_len=MAX_MODEL_LEN,
            prefill_reserve=reserve,
            chunk_tokens=6,
            enable_prefix_cache=cache,
            extra_groups=(GroupCapacity("cross", 6, 4, is_fixed=True),),
            max_encoder_tokens=30,
            late=self.overlapped,
            proposer=Foresight(wrong_every) if wrong_every else None,
        )
        self.ledger = Ledger(self.engine.blocks, lease_s=10.0, late_read_s=1.0)

    # ------------------------------------------------------------------ arrivals

    def arrive(self, data: st.DataObject, *, source: bool = False) -> Case:
        stem = data.draw(st.sampled_from(STEMS))
        prompt = stem[: data.draw(st.integers(1, len(stem)))] + data.draw(st.lists(st.integers(1, 49), max_size=4))
        params = SamplingParams(
            max_tokens=data.draw(st.integers(1, 16)),
            min_tokens=data.draw(st.integers(0, 2)),
            ignore_eos=data.draw(st.booleans()),
            stop_token_ids=(3,),
        )
        expected = expected_tokens(prompt, params, MAX_MODEL_LEN)
        replayed = data.draw(st.integers(0, len(expected) - 1))
        # Some read an encoder input, which several share; others hold a fixed extent of their own.
        encoder_tokens = data.draw(st.sampled_from([(), *ENCODER_INPUTS]))
        seq = self.engine.sequence(
            prompt + expected[:replayed],
            num_prompt=len(prompt),
            priority=data.draw(st.integers(0, 1)),
            extents=() if encoder_tokens else (None, data.draw(st.integers(0, 5))),
            encoder_tokens=encoder_tokens,
            stop_after_first=source,
            params=params,
        )
        self.engine.emitted[seq.id] = expected[:replayed]
        case = Case(seq, prompt, expected[: replayed + 1] if source else expected)
        self.cases.append(case)
        return case

    def add(self, case: Case) -> None:
        try:
            self.engine.scheduler.add(case.seq)
        except RequestTooLong:
            needed = -(-(len(case.prompt) + case.seq.params.max_tokens - 1) // 4)
            assert needed > self.engine.blocks.groups[0].num_blocks
            case.aborted = True

    @rule(data=st.data(), sources=st.lists(st.booleans(), min_size=1, max_size=3))
    def compute(self, data: st.DataObject, sources: list[bool]) -> None:
        for source in sources:
            self.add(self.arrive(data, source=source))

    @rule(data=st.data(), num=st.integers(1, 2))
    def ask_elsewhere(self, data: st.DataObject, num: int) -> None:
        for _ in range(num):
            case = self.arrive(data)
            if not self.reserve(case):
                self.parked.append(case)

    # ------------------------------------------------------------------ pulls

    def draw(self, data: st.DataObject, cases: list[Case]) -> Case:
        return cases.pop(data.draw(st.integers(0, len(cases) - 1)))

    def reserve(self, case: Case) -> bool:
        if case.seq.encoder_input is not None:
            self.add(case)  # nobody else has what its encoder made
            return True
        try:
            case.reservation = self.engine.scheduler.reserve_for_pull(case.seq)
        except RequestTooLong:
            self.add(case)  # only possible here, if at all
            return True
        if case.reservation is not None:
            case.asked = tuple(case.seq.tokens)
            self.pulling.append(case)
            hit = case.seq.tokens[: case.reservation.hit_tokens]
            self.engine.rank.check(case.seq.block_tables[0], hit)
        return case.reservation is not None

    @precondition(lambda self: self.parked)
    @rule(data=st.data(), elsewhere=st.booleans())
    def unpark(self, data: st.DataObject, elsewhere: bool) -> None:
        case = self.draw(data, self.parked)
        if not elsewhere:
            self.add(case)
        elif not self.reserve(case):
            self.parked.append(case)

    @precondition(lambda self: self.pulling)
    @rule(data=st.data(), share=st.floats(0, 1), handoff=st.booleans(), stuck=st.booleans())
    def arrive_blocks(self, data: st.DataObject, share: float, handoff: bool, stuck: bool) -> None:
        """A pull ends: whole, in part, or with a read that goes on after the request has gone its way."""
        case = self.draw(data, self.pulling)
        seq, reservation = case.seq, case.reservation
        assert reservation is not None
        assert case.asked == tuple(seq.tokens), "a token came while another worker was asked for it"
        valid = round(share * len(seq.tokens))
        refs = [BlockRef(group, block) for group, blocks in enumerate(reservation.destination) for block in blocks]
        self.pull_id += 1
        self.ledger.post(self.pull_id, refs, self.now)
        self.engine.rank.receive(reservation.destination[0], reservation.first_block, seq.tokens[:valid])
        if handoff and self.hand_off(case):
            self.ledger.complete(self.pull_id)
            return
        if stuck:
            self.late_pulls.append((self.pull_id, data.draw(st.booleans())))
        else:
            self.ledger.complete(self.pull_id)
        self.engine.scheduler.pull_done(seq, valid)
        assert seq.num_confirmed <= max(valid, reservation.hit_tokens)
        assert not stuck or seq.num_confirmed <= reservation.hit_tokens, "a block that may still be written was kept"

    def hand_off(self, case: Case) -> bool:
        """The source's first token; True if the stream ends with it."""
        token = next_token(histories(case.seq.tokens)[-1])
        finish = self.engine.scheduler.append_token(case.seq, token)
        self.engine.emitted[case.seq.id].append(token)
        if finish is not None:
            self.engine.scheduler.abort(case.seq)
            self.finished.add(case.seq.id)
        return finish is not None

    @precondition(lambda self: self.late_pulls)
    @rule()
    def late_read_ends(self) -> None:
        pull_id, lost = self.late_pulls.pop()
        if lost:
            self.ledger.lose(pull_id)
            self.ledger.land(pull_id)
        else:
            self.ledger.complete(pull_id)

    @precondition(lambda self: self.pulling)
    @rule(data=st.data())
    def wait_too_long(self, data: st.DataObject) -> None:
        case = self.draw(data, self.pulling)
        self.engine.scheduler.release_pull(case.seq)
        self.parked.append(case)

    # ------------------------------------------------------------------ steps

    @rule(data=st.data(), times=st.integers(1, 6))
    def step(self, data: st.DataObject, times: int) -> None:
        for _ in range(times):
            outcome = self.engine.step_overlapped() if self.overlapped else self.engine.step()[1]
            self.take(outcome)
            if outcome is not None:
                self.handle_preempted(data, outcome.preempted)

    def handle_preempted(self, data: st.DataObject, preempted: list[Sequence]) -> None:
        for seq in preempted:
            case = next(case for case in self.cases if case.seq is seq)
            choice = data.draw(st.sampled_from(["recompute", "park", "pull"]))
            if seq.stop_after_first or seq.encoder_input is not None or choice == "recompute":
                continue
            if choice == "park":
                self.engine.scheduler.park(seq)
                self.parked.append(case)
            elif len(seq.tokens) < 20:
                self.reserve_queued(case)

    @rule(data=st.data())
    def pull_queued(self, data: st.DataObject) -> None:
        """At any time, preempted by a plan in flight or not."""
        here = [case for case in self.cases if case.seq.encoder_input is None]
        queued = [case for case in here if case.seq.is_queued and not case.seq.stop_after_first]
        if queued:
            self.reserve_queued(data.draw(st.sampled_from(queued)))

    def reserve_queued(self, case: Case) -> None:
        """Straight from the queue; without room it stays there."""
        try:
            case.reservation = self.engine.scheduler.reserve_for_pull(case.seq)
        except RequestTooLong:
            return
        if case.reservation is not None:
            case.asked = tuple(case.seq.tokens)
            self.pulling.append(case)

    def take(self, outcome: StepOutcome | None) -> None:
        if outcome is None:
            return
        for seq, num_confirmed, _ in outcome.chunks:
            if seq.stop_after_first:
                self.ticket(seq, num_confirmed)
        for seq in outcome.finished:
            assert seq.id not in self.finished, "finished twice"
            self.finished.add(seq.id)

    def ticket(self, seq: Sequence, num_confirmed: int) -> None:
        """Leases what is confirmed, as the prefill stage does after settle."""
        told = self.leased.setdefault(seq.id, {})
        table = seq.block_tables[0]
        for position in range(-(-num_confirmed // 4)):
            self.ledger.lease(seq.key, "reader", [BlockRef(0, table[position])], self.now)
            told[position] = table[position], min(4, num_confirmed - 4 * position)

    @precondition(lambda self: self.leased)
    @rule(data=st.data(), cut=st.booleans())
    def reader_ends(self, data: st.DataObject, cut: bool) -> None:
        """A reader has read all it was told of, whatever became of the source sequence; or its session is cut."""
        id_ = data.draw(st.sampled_from(sorted(self.leased)))
        if cut:
            self.leased.clear()
            self.ledger.end_session("reader", self.now)
            return
        self.check_lease(id_)
        assert self.ledger.release(self.engine.sequences[id_].key)
        del self.leased[id_]

    def check_lease(self, id_: int) -> None:
        seq = self.engine.sequences[id_]
        states = histories(seq.tokens)
        for position, (block, num_tokens) in self.leased[id_].items():
            memory = self.engine.rank.memory[block]
            told = states[position * 4 : position * 4 + num_tokens]
            assert memory[:num_tokens] == told, f"leased block {block} was overwritten"

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.ledger.renew("reader", self.now)
        assert self.ledger.tick(self.now).leases == []

    # ------------------------------------------------------------------ ends

    @precondition(lambda self: self.cases)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        case = data.draw(st.sampled_from(self.cases))
        if case.seq.id not in self.finished:
            case.aborted = True
            self.engine.scheduler.abort(case.seq)
            self.engine.scheduler.abort(case.seq)
            for cases in (self.parked, self.pulling):
                if case in cases:
                    cases.remove(case)

    @rule()
    def clear_cache(self) -> None:
        self.engine.blocks.clear_cache()

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()
            self.ledger.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler = self.engine.scheduler
        for id_ in list(self.leased):
            self.check_lease(id_)
        for pull_id, _ in self.late_pulls:
            self.ledger.complete(pull_id)
        for case in self.pulling:
            scheduler.release_pull(case.seq)
        for case in [*self.parked, *self.pulling]:
            self.add(case)
        self.ledger.end_session("reader", self.now)
        self.ledger.tick(self.now + 2.0)
        self.now += 2.0
        for _ in range(2000):  # starvation shows here
            if not scheduler.has_work:
                break
            self.take(self.engine.step_overlapped() if self.overlapped else self.engine.step()[1])
            self.ledger.end_session("reader", self.now)
            self.now += 2.0
            self.ledger.tick(self.now)
            scheduler.check_integrity()
        assert not scheduler.has_work, "starved"
        self.take(self.engine.land())
        self.ledger.end_session("reader", self.now)
        self.ledger.tick(self.now + 2.0)
        for case in self.cases:
            emitted = self.engine.emitted[case.seq.id]
            assert emitted == case.expected[: len(emitted)], "a wrong token"
            assert case.aborted or emitted == case.expected, "lost tokens"
            assert case.aborted or case.seq.status is SequenceStatus.FINISHED
            assert case.aborted or EOS not in emitted[case.seq.params.min_tokens - 1 : -1] or case.seq.params.ignore_eos
        self.engine.check_empty()


class OverlappedWorkload(Workload):
    """The same with one plan in flight: the device computes a plan after the next one was made."""

    overlapped = True


_SETTINGS = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestWorkload = Workload.TestCase
TestWorkload.settings = _SETTINGS
TestOverlappedWorkload = OverlappedWorkload.TestCase
TestOverlappedWorkload.settings = _SETTINGS

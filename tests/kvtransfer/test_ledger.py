"""Leases, posted reads and quarantine over a real block manager, with a clock of our own."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.request import RequestKey
from kvtransfer.ledger import BlockRef, Ledger
from workers.engine.block_manager import BlockManager, BlockState, GroupCapacity

LEASE_S, LATE_S = 10.0, 3.0
KEYS = [RequestKey(f"r{i}", 0) for i in range(4)]
SIZES = (8, 4)


class Rig:
    """A ledger, its blocks, and the references that a running sequence would have."""

    def __init__(self) -> None:
        self.blocks = BlockManager([GroupCapacity(f"g{i}", size, 4) for i, size in enumerate(SIZES)])
        self.ledger = Ledger(self.blocks, lease_s=LEASE_S, late_read_s=LATE_S)

    def own(self, *counts: int) -> list[BlockRef]:
        got = self.blocks.reserve(counts)
        assert got is not None
        return [BlockRef(group, block) for group, blocks in enumerate(got) for block in blocks]

    def disown(self, refs: list[BlockRef]) -> None:
        for ref in refs:
            self.blocks.release(ref.group, [ref.block])

    def states(self, refs: list[BlockRef]) -> set[BlockState]:
        self.blocks.check_integrity()
        self.ledger.check_integrity()
        return {self.blocks.state(*ref) for ref in refs}


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_leased_blocks_outlive_their_sequence_until_the_release(rig: Rig) -> None:
    refs = rig.own(2, 1)
    generations = rig.ledger.lease(KEYS[0], "s", refs, 0.0)
    assert generations == [rig.blocks.generation(*ref) for ref in refs]
    rig.disown(refs)
    assert rig.states(refs) == {BlockState.FILLING}
    assert rig.ledger.num_leases == 1
    assert rig.ledger.num_leased_blocks == 3
    assert rig.ledger.release(KEYS[0]) is True
    assert rig.states(refs) == {BlockState.FREE}
    assert rig.ledger.release(KEYS[0]) is False


def test_lease_grows_and_counts_a_block_once(rig: Rig) -> None:
    refs = rig.own(3, 0)
    first = rig.ledger.lease(KEYS[0], "s", refs[:2], 0.0)
    second = rig.ledger.lease(KEYS[0], "s", refs[1:], 1.0)
    assert (first[1], rig.ledger.num_leased_blocks, len(second)) == (second[0], 3, 2)
    assert [rig.blocks.num_references(*ref) for ref in refs] == [2, 2, 2]


def test_ended_session_quarantines_for_twice_the_late_read(rig: Rig) -> None:
    refs, others = rig.own(2, 0), rig.own(1, 0)
    rig.ledger.lease(KEYS[0], "gone", refs, 0.0)
    rig.ledger.lease(KEYS[1], "alive", others, 0.0)
    rig.disown(refs + others)
    assert rig.ledger.end_session("gone", 1.0) == [KEYS[0]]
    assert rig.states(refs) == {BlockState.QUARANTINED}
    assert rig.states(others) == {BlockState.FILLING}
    assert rig.ledger.next_deadline() == 1.0 + 2 * LATE_S
    assert rig.ledger.tick(6.9).num_ripe_blocks == 0
    assert rig.states(refs) == {BlockState.QUARANTINED}
    assert rig.ledger.tick(7.0).num_ripe_blocks == 2
    assert rig.states(refs) == {BlockState.FREE}
    assert rig.ledger.end_session("gone", 8.0) == []


def test_signs_of_life_extend_all_leases_of_their_session_only(rig: Rig) -> None:
    refs = rig.own(2, 0)
    rig.ledger.lease(KEYS[0], "a", refs[:1], 0.0)
    rig.ledger.lease(KEYS[1], "b", refs[1:], 0.0)
    rig.ledger.renew("a", 9.0)
    rig.ledger.renew("nobody", 9.0)
    assert rig.ledger.tick(10.0).leases == [KEYS[1]]
    assert rig.ledger.next_deadline() == 16.0  # the quarantine of b, before the lease of a
    assert rig.ledger.tick(18.9).leases == []
    assert rig.ledger.tick(19.0).leases == [KEYS[0]]


def test_expired_lease_ignores_a_late_release(rig: Rig) -> None:
    refs = rig.own(1, 0)
    rig.ledger.lease(KEYS[0], "s", refs, 0.0)
    rig.disown(refs)
    rig.ledger.tick(LEASE_S)
    assert rig.ledger.release(KEYS[0]) is False
    assert rig.states(refs) == {BlockState.QUARANTINED}


def test_same_key_over_a_new_session_leaves_the_old_reader_its_blocks(rig: Rig) -> None:
    old, new = rig.own(1, 0), rig.own(1, 0)
    rig.ledger.lease(KEYS[0], "old", old, 0.0)
    rig.disown(old)
    rig.ledger.lease(KEYS[0], "new", new, 1.0)
    assert rig.states(old) == {BlockState.QUARANTINED}
    assert rig.ledger.end_session("old", 2.0) == []
    assert rig.ledger.has_lease(KEYS[0])


def test_what_enters_quarantine_is_told_once_by_side(rig: Rig) -> None:
    expired, ended, released = rig.own(1, 0), rig.own(2, 0), rig.own(1, 0)
    rig.ledger.lease(KEYS[0], "a", expired, 0.0)
    rig.ledger.tick(LEASE_S)
    rig.ledger.lease(KEYS[1], "b", ended, LEASE_S)
    rig.ledger.end_session("b", LEASE_S)
    rig.ledger.lease(KEYS[0], "a", released, LEASE_S)
    rig.ledger.release(KEYS[0])
    rig.ledger.post(7, rig.own(2, 0), LEASE_S)
    rig.ledger.lose(7)
    assert rig.ledger.take_quarantined() == (3, 2)
    assert rig.ledger.take_quarantined() == (0, 0)


def test_destination_stays_filling_until_the_transport_reports(rig: Rig) -> None:
    refs = rig.own(2, 1)
    rig.ledger.post(7, refs, 0.0)
    rig.disown(refs)  # the request is cancelled
    assert rig.ledger.tick(1e9).num_ripe_blocks == 0
    assert rig.states(refs) == {BlockState.FILLING}
    assert rig.ledger.complete(7) is True
    assert rig.states(refs) == {BlockState.FREE}
    assert rig.ledger.complete(7) is False


def test_lost_read_quarantines_its_destination(rig: Rig) -> None:
    refs = rig.own(1, 1)
    rig.ledger.post(7, refs, 0.0)
    assert rig.ledger.lose(7) is True
    assert rig.states(refs) == {BlockState.FILLING}, "the sequence still has them"
    rig.disown(refs)
    assert rig.states(refs) == {BlockState.QUARANTINED}
    assert rig.ledger.complete(7) is False
    rig.ledger.tick(1e9)
    assert rig.states(refs) == {BlockState.QUARANTINED}, "a cut link may come back at any time"
    assert rig.ledger.land(7) is True
    assert rig.states(refs) == {BlockState.FREE}
    assert rig.ledger.land(7) is False


def test_quarantined_block_with_valid_content_can_be_hit(rig: Rig) -> None:
    refs = rig.own(1, 0)
    rig.ledger.lease(KEYS[0], "s", refs, 0.0)
    rig.blocks.mark_ready(0, refs[0].block, b"h" * 16)
    rig.disown(refs)
    rig.ledger.end_session("s", 0.0)
    assert rig.states(refs) == {BlockState.QUARANTINED}
    hit = rig.blocks.lookup(0, [b"h" * 16], 1)
    rig.blocks.acquire(0, hit)
    assert rig.states(refs) == {BlockState.READY}
    rig.blocks.release(0, hit)
    rig.ledger.tick(2 * LATE_S)
    assert rig.states(refs) == {BlockState.CACHED}


def test_clocks_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"lease_s=0\.0"):
        Ledger(BlockManager([GroupCapacity("self", 1, 1)]), lease_s=0.0, late_read_s=1.0)


class LedgerLife(RuleBasedStateMachine):
    """Random readers and reads. A block that anybody outside may touch is never FREE nor handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig()
        self.now = 0.0
        self.owned: list[list[BlockRef]] = []
        self.leases: dict[RequestKey, tuple[str, set[BlockRef], float]] = {}
        self.renewed: dict[str, float] = {}
        self.posted: dict[int, list[BlockRef]] = {}
        self.lost: dict[int, list[BlockRef]] = {}
        self.until: list[tuple[float, BlockRef]] = []
        self.pull_id = 0

    @rule(counts=st.tuples(st.integers(0, 3), st.integers(0, 2)))
    def own(self, counts: tuple[int, int]) -> None:
        got = self.rig.blocks.reserve(counts)
        if got is not None:
            refs = [BlockRef(group, block) for group, blocks in enumerate(got) for block in blocks]
            assert not self.touched().intersection(refs)
            self.owned.append(refs)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def disown(self, data: st.DataObject) -> None:
        self.rig.disown(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), key=st.sampled_from(KEYS), session=st.sampled_from("ab"))
    def lease(self, data: st.DataObject, key: RequestKey, session: str) -> None:
        refs = data.draw(st.sampled_from(self.owned))
        if key in self.leases and self.leases[key][0] != session:
            self.quarantine(key)
        self.rig.ledger.lease(key, session, refs, self.now)
        self.leases[key] = (session, self.leases.get(key, ("", set(), 0.0))[1] | set(refs), self.now)

    def quarantine(self, key: RequestKey) -> None:
        self.until += [(self.now + 2 * LATE_S, ref) for ref in self.leases.pop(key)[1]]

    @rule(key=st.sampled_from(KEYS))
    def release(self, key: RequestKey) -> None:
        assert self.rig.ledger.release(key) is (self.leases.pop(key, None) is not None)

    @rule(session=st.sampled_from("ab"))
    def renew(self, session: str) -> None:
        self.rig.ledger.renew(session, self.now)
        self.renewed[session] = self.now

    @rule(session=st.sampled_from("ab"))
    def end_session(self, session: str) -> None:
        keys = [key for key, lease in self.leases.items() if lease[0] == session]
        assert self.rig.ledger.end_session(session, self.now) == sorted(keys)
        for key in keys:
            self.quarantine(key)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def post(self, data: st.DataObject) -> None:
        self.pull_id += 1
        self.posted[self.pull_id] = data.draw(st.sampled_from(self.owned))
        self.rig.ledger.post(self.pull_id, self.posted[self.pull_id], self.now)

    @precondition(lambda self: self.posted)
    @rule(data=st.data(), lost=st.booleans())
    def report(self, data: st.DataObject, lost: bool) -> None:
        pull_id = data.draw(st.sampled_from(sorted(self.posted)))
        refs = self.posted.pop(pull_id)
        if lost:
            assert self.rig.ledger.lose(pull_id)
            self.lost[pull_id] = refs
        else:
            assert self.rig.ledger.complete(pull_id)

    @precondition(lambda self: self.lost)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        pull_id = data.draw(st.sampled_from(sorted(self.lost)))
        del self.lost[pull_id]
        assert self.rig.ledger.land(pull_id)

    @rule(seconds=st.sampled_from([0.0, 0.5, LATE_S, 2 * LATE_S, LEASE_S]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        expected = [
            key
            for key, (session, _, granted) in self.leases.items()
            if max(granted, self.renewed.get(session, 0.0)) + LEASE_S <= self.now
        ]
        deadline = self.rig.ledger.next_deadline()
        expired = self.rig.ledger.tick(self.now)
        assert sorted(expired.leases) == sorted(expected)
        if expired.leases or expired.num_ripe_blocks:
            assert deadline is not None and deadline <= self.now, "next_deadline would have slept too long"
        for key in expected:
            self.quarantine(key)
        ripe = [ref for until, ref in self.until if until <= self.now]
        assert expired.num_ripe_blocks == len(ripe)
        self.until = [entry for entry in self.until if entry[0] > self.now]

    def touched(self) -> set[BlockRef]:
        leased = {ref for _, refs, _ in self.leases.values() for ref in refs}
        read = {ref for refs in (*self.posted.values(), *self.lost.values()) for ref in refs}
        return leased | read | {ref for _, ref in self.until}

    @invariant()
    def agrees(self) -> None:
        self.rig.blocks.check_integrity()
        ledger = self.rig.ledger
        ledger.check_integrity()
        assert ledger.num_leases == len(self.leases)
        assert ledger.num_leased_blocks == sum(len(refs) for _, refs, _ in self.leases.values())
        assert ledger.num_posted == len(self.posted)
        assert ledger.num_quarantined == len(self.until) + sum(map(len, self.lost.values()))
        owned = {ref for refs in self.owned for ref in refs}
        for group, size in enumerate(SIZES):
            for block in range(1, size + 1):
                ref = BlockRef(group, block)
                free = self.rig.blocks.state(group, block) is BlockState.FREE
                assert free is (ref not in owned and ref not in self.touched())

    def teardown(self) -> None:
        for refs in self.owned:
            self.rig.disown(refs)
        for pull_id in self.posted:
            self.rig.ledger.complete(pull_id)
        for pull_id in self.lost:
            self.rig.ledger.land(pull_id)
        self.rig.ledger.end_session("a", self.now)
        self.rig.ledger.end_session("b", self.now)
        self.rig.ledger.tick(self.now + 2 * LATE_S)
        assert [self.rig.blocks.counts(group).free for group in range(2)] == list(SIZES)
        assert self.rig.ledger.next_deadline() is None or self.rig.ledger.num_leases == 0


TestLedgerLife = LedgerLife.TestCase
TestLedgerLife.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)

"""Planner and executor together over loopback: bytes, generations, and every way in which a read can go wrong."""

from __future__ import annotations

import pytest

from cluster.errors import TransferError
from cluster.protos import worker_pb2 as pb
from kvtransfer.connector import BlockPair, BlockRun, BlockSpan, Done, Outcome
from tests.support.kv_builders import KEY, STUCK_S, T_S, KvPair, heads_geometry
from workers.engine.block_manager import BlockState


@pytest.mark.parametrize(
    ("source_tp", "sink_tp"), [(1, 1), (2, 2), (2, 1), (1, 2), (4, 2), (2, 4), (8, 1), (1, 8), (8, 2)]
)
def test_every_layout_pulls_the_sources_bytes(source_tp: int, sink_tp: int) -> None:
    pair = KvPair(source_tp=source_tp, sink_tp=sink_tp, geometry=heads_geometry(kv_heads=4))
    for group in (0, 1):
        theirs, ours, pull = pair.start([11, 12, 13], group=group)
        (result,) = pair.sink.pump()
        assert (result.outcome, result.pull, result.key) == (Outcome.OK, pull, KEY)
        assert result.valid_pairs == tuple(BlockPair(group, a, b) for a, b in zip(theirs, ours, strict=True))
        assert [pair.sink.holds(group, block, content) for block, content in zip(ours, [11, 12, 13], strict=True)] == [
            True
        ] * 3
        spec = heads_geometry(kv_heads=4).groups[group]
        assert result.num_bytes == 3 * spec.block_bytes(sink_tp) * sink_tp
        pair.check()


def test_a_pull_is_done_when_every_rank_has_reported_and_only_once() -> None:
    pair = KvPair(source_tp=2, sink_tp=2, geometry=heads_geometry())
    _, ours, pull = pair.start([1])
    pair.sink.ranks[0].executor.run_once()
    assert [done.rank for done in pair.sink.dones] == [0]
    assert pair.sink.settle() == []
    assert pair.sink.sink.done(Done(pull.id, 0, Outcome.OK), 0.0) is None, "a repeated report counts once"
    assert pair.sink.blocks.num_references(0, ours[0]) == 2
    pair.sink.ranks[1].executor.run_once()
    assert [result.outcome for result in pair.sink.settle()] == [Outcome.OK]
    assert pair.sink.blocks.num_references(0, ours[0]) == 1
    assert pair.sink.sink.done(Done(pull.id, 1, Outcome.OK), 0.0) is None


def test_two_source_ranks_stay_in_flight_until_the_last_read_is_over() -> None:
    pair = KvPair(source_tp=2, sink_tp=1, geometry=heads_geometry())
    pair.fabric.hold("source/1")
    _, ours, _ = pair.start([1])
    pair.sink.run_once()
    pair.fabric.kill("source/0")
    assert pair.sink.pump() == [], "rank 1 may still write"
    assert pair.sink.blocks.num_references(0, ours[0]) == 2
    pair.fabric.resume("source/1")
    (result,) = pair.sink.pump()
    assert result.outcome is Outcome.LOST
    assert "source/0" in result.errors[0]


def test_raises_of_the_destination_are_written_before_the_read() -> None:
    pair = KvPair()
    pair.hold()
    _, ours, _ = pair.start([1, 2])
    table = pair.sink.ranks[0].pool.generations[0].entries
    assert table[ours].tolist() == [0, 0]
    pair.sink.run_once()
    assert table[ours].tolist() == [1, 1]
    assert pair.reads()[0].position == 0


def test_a_block_reused_mid_read_is_stale_and_the_others_are_kept() -> None:
    pair = KvPair()
    pair.hold()
    theirs, _, _ = pair.start([1, 2, 3])
    pair.sink.run_once()
    pair.source.blocks.release(0, theirs)
    pair.source.source.release(KEY)  # too early: what a faulty or very late peer sees
    (reused,) = pair.source.reserve(1)
    pair.source.write(0, reused, 99)
    for agent in pair.source.agents:
        pair.fabric.resume(agent)
    (result,) = pair.sink.pump()
    assert result.outcome is Outcome.STALE
    kept = {pair_.source_block: pair_.sink_block for pair_ in result.valid_pairs}
    assert set(theirs) - set(kept) == {reused}
    assert all(pair.sink.holds(0, kept[block], c) for block, c in zip(theirs, [1, 2, 3], strict=True) if block in kept)
    pair.check()


@pytest.mark.parametrize(("late_read_s", "outcome"), [(T_S, Outcome.LATE), (1000.0, Outcome.STALE)])
def test_a_sink_stopped_mid_read_beyond_quarantine_throws_the_data_away(late_read_s: float, outcome: Outcome) -> None:
    """Both guards: the sink's own clock, and, where that is no help, the generations."""
    pair = KvPair(late_read_s=late_read_s)
    pair.hold()
    theirs, ours, _ = pair.start([1, 2])
    pair.sink.run_once()
    read = pair.reads()[0]
    read.copy(1)  # and here the sink's process freezes
    pair.source.source.end_session("session", pair.clock.now)
    pair.source.blocks.release(0, theirs)
    pair.clock.now += 2 * T_S - 0.01
    pair.source.source.tick(pair.clock.now)
    assert [pair.source.blocks.state(0, block) for block in theirs] == [BlockState.QUARANTINED] * 2
    pair.clock.now += 0.02
    pair.source.source.tick(pair.clock.now)
    assert [pair.source.blocks.state(0, block) for block in theirs] == [BlockState.FREE] * 2
    for block in pair.source.reserve(8):
        pair.source.write(0, block, 99)
    pair.fabric.resume("source/0")  # it continues, and reads what is there now
    (result,) = pair.sink.pump()
    assert not pair.sink.holds(0, ours[0], 1) and not pair.sink.holds(0, ours[0], 99), "half of each"
    assert pair.sink.holds(0, ours[1], 99), "another request's bytes"
    assert (result.outcome, result.valid_pairs) == (outcome, ())
    pair.check()


def test_late_begins_at_t_and_is_measured_by_the_sink_to_the_end_of_the_check() -> None:
    for beyond, outcome in ((0.0, Outcome.OK), (0.01, Outcome.LATE)):
        pair = KvPair()
        pair.hold()
        pair.start([1])
        pair.sink.run_once()
        pair.clock.now += T_S + beyond
        pair.reads()[0].copy()
        pair.fabric.resume("source/0")
        (result,) = pair.sink.pump()
        assert (result.outcome, result.seconds) == (outcome, pytest.approx(T_S + beyond))


def test_the_sources_t_counts_when_it_is_shorter() -> None:
    pair = KvPair()
    offer = pair.source.offer()
    offer.late_read_ms = 1000
    pair.sink.ranks[0].executor.connect("strict", offer, pair.sink.connected.append)
    pair.sink.pump()
    pair.sink.pump()
    theirs = pair.source.filled([1])
    runs = pair.source.publish(KEY, "session", theirs)
    while pair.sink.run_once():
        pass
    pair.hold()
    pair.sink.pull(KEY, "strict", runs, pair.sink.reserve(1))
    pair.sink.run_once()
    pair.clock.now += 1.5
    pair.fabric.resume("source/0")
    assert [result.outcome for result in pair.sink.pump()] == [Outcome.LATE]


def test_a_read_that_never_completes_is_stuck_and_its_blocks_rest() -> None:
    pair = KvPair()
    pair.hold()
    _, ours, _ = pair.start([1, 2])
    pair.sink.run_once()
    pair.clock.now += STUCK_S
    assert pair.sink.pump() == []
    pair.clock.now += 0.01
    (result,) = pair.sink.pump()
    assert (result.outcome, result.valid_pairs) == (Outcome.STUCK, ())
    pair.sink.blocks.release(0, ours)
    assert pair.sink.blocks.counts(0).quarantined == 2
    reserved = pair.sink.reserve(6)
    assert not set(reserved) & set(ours), "what may still be written is not handed out"
    assert pair.sink.blocks.reserve([1]) is None
    pair.clock.now += 100 * T_S
    pair.sink.ledger.tick(pair.clock.now)
    assert pair.sink.blocks.counts(0).quarantined == 2, "the cable may be back at any time"
    assert len(pair.reads()) == 1, "the handle is kept: it may still complete"
    pair.fabric.resume("source/0")
    assert pair.sink.pump() == []
    assert pair.reads() == []
    assert pair.sink.blocks.counts(0).free == 2
    pair.check()


def test_the_blocks_of_a_stuck_read_rest_until_every_rank_has_reported_again() -> None:
    pair = KvPair(sink_tp=2, geometry=heads_geometry())
    pair.hold()
    _, ours, pull = pair.start([1])
    for _ in pair.sink.ranks:
        pair.sink.run_once()
    pair.clock.now += STUCK_S + 0.01
    assert [result.outcome for result in pair.sink.pump()] == [Outcome.STUCK]
    pair.sink.blocks.release(0, ours)
    for rank, outcome in ((0, Outcome.STUCK), (0, Outcome.LOST), (0, Outcome.LOST)):
        assert pair.sink.sink.done(Done(pull.id, rank, outcome), pair.clock.now) is None
        assert pair.sink.blocks.counts(0).quarantined == 1
    assert pair.sink.sink.done(Done(pull.id, 1, Outcome.LOST), pair.clock.now) is None
    assert pair.sink.blocks.counts(0).quarantined == 0
    pair.check()


def test_a_killed_source_loses_the_read_at_the_next_poll() -> None:
    pair = KvPair()
    pair.hold()
    _, ours, _ = pair.start([1, 2])
    pair.sink.run_once()
    pair.fabric.kill("source/0")
    (result,) = pair.sink.pump()
    assert (result.outcome, result.valid_pairs) == (Outcome.LOST, ())
    assert [pair.sink.blocks.num_references(0, block) for block in ours] == [1, 1]
    pair.sink.blocks.release(0, ours)
    assert pair.sink.blocks.counts(0).free == 8


def test_a_source_killed_between_data_and_check_is_lost() -> None:
    pair = KvPair()
    pair.hold()
    pair.start([1])
    pair.sink.run_once()
    pair.reads()[0].copy()
    assert pair.sink.pump() == []
    (check,) = pair.reads()
    assert check.num_left == 1
    pair.fabric.kill("source/0")
    assert [result.outcome for result in pair.sink.pump()] == [Outcome.LOST]


def test_a_transport_error_is_lost_and_says_why() -> None:
    pair = KvPair()
    pair.fabric.fail("source/0")
    pair.start([1])
    (result,) = pair.sink.pump()
    assert result.outcome is Outcome.LOST
    assert "injected failure" in result.errors[0]


def test_cancel_in_flight_keeps_the_destination_until_completion() -> None:
    pair = KvPair()
    pair.hold()
    _, ours, _ = pair.start([1, 2, 3])
    pair.sink.run_once()
    pair.reads()[0].copy(1)
    assert pair.sink.sink.num_pulls_of(KEY) == 1
    pair.sink.blocks.release(0, ours)
    assert [pair.sink.blocks.state(0, block) for block in ours] == [BlockState.FILLING] * 3
    assert not set(pair.sink.reserve(5)) & set(ours)
    assert pair.sink.blocks.reserve([1]) is None
    pair.fabric.resume("source/0")
    (result,) = pair.sink.pump()
    assert result.outcome is Outcome.OK
    assert sorted(pair.sink.reserve(3)) == sorted(ours)
    assert pair.sink.sink.num_pulls_of(KEY) == 0
    pair.check()


def test_chunks_of_one_request_are_separate_pulls() -> None:
    pair = KvPair()
    theirs, ours = pair.source.filled([1, 2, 3]), pair.sink.reserve(3)
    for first, blocks in ((0, theirs[:2]), (2, theirs[2:])):
        runs = pair.source.source.publish(KEY, "session", [BlockSpan(0, first, tuple(blocks))], pair.clock.now)
        pair.sink.pull(KEY, "source", runs, ours)
    assert pair.sink.sink.num_pulls_of(KEY) == 2
    results = pair.sink.pump()
    assert [len(result.valid_pairs) for result in results] == [2, 1]
    assert all(pair.sink.holds(0, block, content) for block, content in zip(ours, [1, 2, 3], strict=True))
    assert pair.source.ledger.num_leased_blocks == 3
    assert pair.source.source.release(KEY)
    assert not pair.source.source.release(KEY)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([BlockRun(BlockSpan(0, 1, (1, 2)), (1, 1))], "block 2 of group 0 is outside"),
        ([BlockRun(BlockSpan(1, 0, (1,)), (1,))], "block 0 of group 1 is outside"),
        ([BlockRun(BlockSpan(0, 0, (1,)), (1,)), BlockRun(BlockSpan(0, 0, (2,)), (1,))], "came twice"),
        ([BlockRun(BlockSpan(0, 0, (0,)), (1,))], "block id 0"),
        ([BlockRun(BlockSpan(0, 0, (1,)), (0,))], "generation 0"),
        ([], "names no block"),
    ],
)
def test_a_ticket_that_cannot_be_meant_changes_nothing(runs: list[BlockRun], message: str) -> None:
    pair = KvPair()
    ours = pair.sink.reserve(2)
    with pytest.raises(TransferError, match=message):
        pair.sink.sink.plan(KEY, "source", runs, [BlockSpan(0, 0, tuple(ours))], [], pair.clock.now)
    assert pair.sink.sink.num_in_flight == pair.sink.ledger.num_posted == 0
    assert [pair.sink.blocks.num_references(0, block) for block in ours] == [1, 1]
    pair.check()


def test_a_ticket_for_blocks_in_flight_is_refused() -> None:
    pair = KvPair()
    pair.hold()
    theirs, ours, _ = pair.start([1])
    with pytest.raises(TransferError, match="came twice"):
        pair.sink.pull(KEY, "source", pair.source.publish(KEY, "session", theirs), ours)
    pair.check()


def test_a_source_block_outside_its_pool_is_lost_without_a_read() -> None:
    pair = KvPair()
    ours = pair.sink.reserve(1)
    pair.sink.pull(KEY, "source", [BlockRun(BlockSpan(0, 0, (1000,)), (1,))], ours)
    (result,) = pair.sink.pump()
    assert result.outcome is Outcome.LOST
    assert "block 1000" in result.errors[0]


def test_runs_survive_the_wire() -> None:
    run = BlockRun(BlockSpan(1, 3, (5, 9)), (1, 1 << 40))
    assert BlockRun.of(pb.BlockRun.FromString(run.wire().SerializeToString())) == run
    with pytest.raises(ValueError, match="2 blocks, 1 generations"):
        BlockRun.of(pb.BlockRun(block_ids=[1, 2], generations=[1]))


def test_an_expired_lease_and_a_renewed_one() -> None:
    pair = KvPair()
    theirs = pair.source.filled([1])
    pair.source.publish(KEY, "session", theirs)
    pair.source.blocks.release(0, theirs)
    pair.clock.now += 9.0
    pair.source.source.renew("session", pair.clock.now)
    pair.clock.now += 9.0
    assert pair.source.source.tick(pair.clock.now).leases == []
    pair.clock.now += 1.0
    assert pair.source.source.tick(pair.clock.now).leases == [KEY]
    assert pair.source.blocks.counts(0).quarantined == 1

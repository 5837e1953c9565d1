"""Sequences whose KV comes from elsewhere: reservations, what arrives, what does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import RequestTooLong
from cluster.request import FinishReason, SamplingParams
from tests.support.engine_builders import EngineDouble, expected_tokens, histories, next_token
from workers.engine.block_manager import BlockState
from workers.engine.scheduler import PullReservation
from workers.engine.sequence import Sequence, SequenceStatus


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def pulled(engine: EngineDouble, tokens: list[int], max_tokens: int = 4) -> tuple[Sequence, PullReservation]:
    seq = engine.sequence(tokens, params=greedy(max_tokens))
    reservation = engine.scheduler.reserve_for_pull(seq)
    assert reservation is not None
    return seq, reservation


def test_pull_reserves_what_the_cache_lacks_and_decodes_after_the_handoff() -> None:
    engine = EngineDouble()
    engine.scheduler.add(engine.sequence(list(range(6)), params=greedy(1)))
    engine.run()
    prompt = [*range(4), 30, 31, 32]
    seq, reservation = pulled(engine, prompt)
    assert (reservation.first_block, reservation.hit_tokens, len(reservation.destination[0])) == (1, 4, 1)
    assert [r.block for r in reservation.raises] == list(reservation.destination[0])
    assert seq.status is SequenceStatus.PULLING
    assert engine.step()[0].sequences == ()
    token = next_token(histories(prompt)[-1])
    assert engine.scheduler.append_token(seq, token) is None
    engine.rank.receive(reservation.destination[0], reservation.first_block, prompt)
    engine.scheduler.pull_done(seq, 7)
    plan = engine.step()[0]
    assert [(row.start, row.num_tokens, row.sample) for row in plan.sequences] == [(7, 1, True)]
    assert plan.new[0].block_tables[0] == tuple(seq.block_tables[0])
    engine.run()
    assert [token, *engine.emitted[seq.id]] == expected_tokens(prompt, seq.params, 64)
    engine.check_empty()


@pytest.mark.parametrize(("num_tokens", "handoff", "start"), [(8, True, 8), (8, False, 4), (7, False, 4)])
def test_pure_sink_hits_every_full_block_but_never_writes_into_one(num_tokens: int, handoff: bool, start: int) -> None:
    engine = EngineDouble()
    prompt = list(range(num_tokens))
    engine.scheduler.add(engine.sequence(list(range(9)), params=greedy(1)))
    engine.run()
    seq, reservation = pulled(engine, prompt)
    assert reservation.first_block == num_tokens // 4
    assert len(reservation.destination[0]) == (num_tokens % 4 > 0)
    if handoff:
        engine.scheduler.append_token(seq, next_token(histories(prompt)[-1]))
    engine.scheduler.pull_done(seq, num_tokens if handoff else 0)
    assert engine.step()[0].sequences[0].start == start
    engine.run()
    engine.check_empty()


@given(valid=st.integers(0, 11), handoff=st.booleans())
def test_short_pull_recomputes_the_rest(valid: int, handoff: bool) -> None:
    engine = EngineDouble()
    prompt = list(range(11))
    seq, reservation = pulled(engine, prompt, max_tokens=3)
    engine.rank.receive(reservation.destination[0], 0, prompt[:valid])
    emitted = []
    if handoff:
        emitted.append(next_token(histories(prompt)[-1]))
        engine.scheduler.append_token(seq, emitted[0])
    engine.scheduler.pull_done(seq, valid)
    assert seq.num_computed == min(valid, len(seq.tokens) - 1)
    engine.scheduler.check_integrity()
    engine.run()
    assert emitted + engine.emitted[seq.id] == expected_tokens(prompt, seq.params, 64)
    engine.check_empty()


def test_block_that_a_read_may_still_write_into_is_given_back() -> None:
    engine = EngineDouble()
    prompt = list(range(10))
    seq, reservation = pulled(engine, prompt)
    stuck = [(0, reservation.destination[0][1])]
    engine.blocks.pin(stuck)
    engine.blocks.hold(stuck)
    engine.blocks.unpin(stuck)
    engine.rank.receive(reservation.destination[0], 0, prompt)
    engine.scheduler.pull_done(seq, 10)
    assert seq.num_confirmed == 4
    assert engine.blocks.state(*stuck[0]) is BlockState.QUARANTINED
    engine.run()
    engine.blocks.unhold(stuck)
    engine.check_empty()


def test_pulls_leave_the_reserve_to_computing_and_start_again_when_released() -> None:
    engine = EngineDouble(num_blocks=8, prefill_reserve=0.5)
    first, _ = pulled(engine, [1] * 12)
    second = engine.sequence([2] * 8)
    assert engine.scheduler.reserve_for_pull(second) is None
    local = engine.sequence([3] * 16, params=greedy(1))
    engine.scheduler.add(local)
    engine.run()
    assert local.is_finished
    engine.scheduler.release_pull(first)
    assert (first.status, first.block_tables) == (SequenceStatus.WAITING, [])
    assert engine.scheduler.reserve_for_pull(second) is not None
    engine.scheduler.add(first)
    engine.run()
    assert first.is_finished
    engine.scheduler.abort(second)
    with pytest.raises(RequestTooLong, match=r"20 tokens need 5 blocks.*prefill_reserve=0\.5"):
        engine.scheduler.reserve_for_pull(engine.sequence([1] * 20))
    engine.check_empty()


def test_pull_that_found_no_room_holds_back_those_behind_it_for_one_step() -> None:
    engine = EngineDouble(num_blocks=4, prefill_reserve=0.0, max_model_len=16)
    engine.scheduler.add(engine.sequence([1] * 8, params=greedy(1)))
    engine.scheduler.add(engine.sequence([2] * 3, params=greedy(9)))
    engine.step()
    waits = engine.sequence([3] * 16, params=greedy(1), num_prompt=16)
    with pytest.raises(RequestTooLong):
        engine.scheduler.add(waits)
    waits = engine.sequence([3] * 15, params=greedy(1))
    assert engine.scheduler.reserve_for_pull(waits) is None
    behind = engine.sequence([4], params=greedy(1))
    engine.scheduler.add(behind)
    engine.step()
    assert behind.status is SequenceStatus.WAITING
    engine.step()  # not asked for again
    assert behind.is_finished


def test_preempted_sequence_can_be_pulled_instead_of_recomputed() -> None:
    engine = EngineDouble(num_blocks=4, max_model_len=16, prefill_reserve=0.0, enable_prefix_cache=False)
    first = engine.sequence([1] * 7, params=greedy(4))
    second = engine.sequence([2] * 7, params=greedy(5))
    engine.scheduler.add(first)
    engine.scheduler.add(second)
    while not (outcome := engine.step()[1]).preempted:
        pass
    assert outcome.preempted == [second]
    engine.scheduler.park(second)
    while engine.scheduler.has_work:
        engine.step()
    assert not second.is_finished
    reservation = engine.scheduler.reserve_for_pull(second)
    assert reservation is not None
    engine.rank.receive(reservation.destination[0], reservation.first_block, second.tokens)
    token = next_token(histories(second.tokens)[-1])
    num_known = len(second.tokens)
    engine.scheduler.append_token(second, token)
    engine.scheduler.pull_done(second, num_known)
    assert [entry.id for entry in engine.step()[0].resumed] == [second.id]
    engine.run()
    assert second.tokens[7:] == expected_tokens([2] * 7, second.params, 16)


def test_request_that_ends_with_the_handoff() -> None:
    engine = EngineDouble()
    seq, _ = pulled(engine, [1, 2, 3], max_tokens=1)
    assert engine.scheduler.append_token(seq, 9) is FinishReason.LENGTH
    engine.scheduler.abort(seq)
    assert engine.scheduler.num_pulling == 0
    engine.check_empty()


def test_no_pull_while_a_step_in_flight_may_bring_a_token() -> None:
    engine = EngineDouble(num_blocks=6, max_model_len=16, prefill_reserve=0.0)
    first = engine.sequence([1] * 4, params=greedy(6))
    second = engine.sequence([2] * 2, params=greedy(6))
    engine.scheduler.add(first)
    engine.scheduler.add(second)
    others = engine.blocks.reserve([4])
    assert others is not None
    plan = engine.scheduler.schedule()
    preempting = engine.scheduler.schedule()  # the first needs a second block
    assert preempting.preempted == (second.id,)
    assert second.num_pending == 1
    engine.blocks.release(0, others[0])
    assert engine.scheduler.reserve_for_pull(second) is None
    outcomes = [engine.settle(plan), engine.settle(preempting)]
    assert [outcome.preempted for outcome in outcomes] == [[], [second]]
    assert [token.seq for token in outcomes[0].tokens] == [first, second]
    assert engine.scheduler.reserve_for_pull(second) is not None
    engine.scheduler.release_pull(second)
    engine.scheduler.add(second)
    engine.run()
    assert engine.emitted[second.id] == expected_tokens([2] * 2, second.params, 16)
    engine.check_empty()

"""Plans, admission, preemption, refusals and ends, case by case. Random workloads: test_scheduler_workloads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.errors import InvalidRequest, RequestTooLong
from cluster.request import FinishReason, SamplingParams
from tests.support.engine_builders import EngineDouble, expected_tokens, histories, next_token
from workers.engine.block_manager import BlockState, GroupCapacity
from workers.engine.sequence import SequenceStatus
from workers.engine.step_plan import Chunk, Literal, PreviousRow, SampledToken, StepPlan, StepResult


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def rows(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(row.id, row.start, row.num_tokens, row.sample) for row in plan.sequences]


# ---------------------------------------------------------------- plans


def test_prompt_in_block_aligned_chunks_then_one_token_a_step() -> None:
    engine = EngineDouble(chunk_tokens=7)
    seq = engine.sequence(list(range(1, 15)), params=greedy(3))
    engine.scheduler.add(seq)
    plans = [engine.step()[0] for _ in range(5)]
    assert [rows(plan) for plan in plans] == [
        [(1, 0, 4, False)],  # 7 would end within a block
        [(1, 4, 4, False)],
        [(1, 8, 6, True)],
        [(1, 14, 1, True)],
        [(1, 15, 1, True)],
    ]
    assert engine.emitted[1] == expected_tokens(list(range(1, 15)), seq.params, 64)
    assert seq.finish is FinishReason.LENGTH
    assert not engine.scheduler.has_work


def test_plan_is_a_delta() -> None:
    engine = EngineDouble()
    seq = engine.sequence([1, 2, 3, 4], params=greedy(6))
    engine.scheduler.add(seq)
    first, *others = [engine.step()[0] for _ in range(6)]
    assert [(new.id, new.num_prompt, new.params, len(new.block_tables[0])) for new in first.new] == [
        (1, 4, seq.params, 1)
    ]
    assert [len(row.appends) for plan in others for row in plan.sequences] == [1, 0, 0, 0, 1]
    assert all(not plan.new and not plan.finished for plan in others)
    assert [len(plan.raises) for plan in (first, *others)] == [1, 1, 0, 0, 0, 1]
    last = engine.step()[0]
    assert (last.sequences, last.num_tokens, last.finished) == ((), 0, (1,))
    assert engine.step()[0].finished == ()


def test_running_sequences_take_one_token_each_before_the_chunks() -> None:
    engine = EngineDouble(max_batched_tokens=8, chunk_tokens=8)
    first = engine.sequence([1, 2], params=greedy(9))
    second = engine.sequence([3, 4], params=greedy(9))
    engine.scheduler.add(first)
    engine.scheduler.add(second)
    engine.step()
    long = engine.sequence(list(range(20)), params=greedy(1))
    engine.scheduler.add(long)
    plan = engine.step()[0]
    assert rows(plan) == [(1, 2, 1, True), (2, 2, 1, True), (3, 0, 4, False)]
    assert plan.num_tokens == 6


def test_first_sight_of_a_chunk_and_the_handoff_of_a_source() -> None:
    engine = EngineDouble(chunk_tokens=4)
    seq = engine.sequence(list(range(6)), stop_after_first=True, params=greedy(50))
    engine.scheduler.add(seq)
    first, second = engine.step()[1], engine.step()[1]
    assert (first.chunks, first.tokens) == ([Chunk(seq, 4)], [])
    assert second.chunks == [Chunk(seq, 6)]
    assert second.tokens == [SampledToken(seq, next_token(histories(range(6))[-1]), 0, FinishReason.LENGTH)]
    assert second.finished == [seq]
    states = [engine.blocks.state(0, block) for block in seq.block_tables[0]]
    assert states == [BlockState.READY, BlockState.FILLING], "the stage may still lease them"
    assert engine.scheduler.has_work
    engine.step()
    assert seq.block_tables == []
    assert not engine.scheduler.has_work
    engine.check_empty()


def test_leased_blocks_of_a_source_survive_its_end() -> None:
    engine = EngineDouble()
    seq = engine.sequence(list(range(6)), stop_after_first=True)
    engine.scheduler.add(seq)
    engine.step()
    refs = [(0, block) for block in seq.block_tables[0]]
    engine.blocks.pin(refs)
    engine.step()
    engine.rank.check([block for _, block in refs], list(range(6)))
    assert [engine.blocks.state(*ref) for ref in refs] == [BlockState.READY, BlockState.FILLING]
    engine.blocks.unpin(refs)
    assert [engine.blocks.state(*ref) for ref in refs] == [BlockState.CACHED, BlockState.FREE]


def test_replay_continues_after_the_emitted_tokens() -> None:
    engine = EngineDouble()
    params = greedy(6)
    expected = expected_tokens([5, 6, 7], params, 64)
    seq = engine.sequence([5, 6, 7, *expected[:4]], num_prompt=3, params=params)
    engine.scheduler.add(seq)
    outcomes = engine.run()
    assert [(t.token, t.first_token_index) for outcome in outcomes for t in outcome.tokens] == [
        (expected[4], 4),
        (expected[5], 5),
    ]


def test_stops_at_max_model_len() -> None:
    engine = EngineDouble(max_model_len=10)
    seq = engine.sequence([1] * 7, params=greedy(100))
    engine.scheduler.add(seq)
    engine.run()
    assert (len(seq.tokens), seq.finish) == (10, FinishReason.LENGTH)


def test_overlapped_step_takes_its_input_from_the_previous_row() -> None:
    engine = EngineDouble(late=True)
    for prompt in ([1], [2, 3]):
        engine.scheduler.add(engine.sequence(prompt, params=greedy(3)))
    engine.step_overlapped()
    engine.step_overlapped()
    assert engine.in_flight is not None
    assert [row.inputs for row in engine.in_flight.sequences] == [PreviousRow(0), PreviousRow(1)]
    engine.step_overlapped()
    engine.step_overlapped()
    assert engine.in_flight.sequences == (), "the last token was in flight already"
    engine.land()
    for seq in engine.sequences.values():
        assert engine.emitted[seq.id] == expected_tokens(seq.tokens[: seq.num_prompt], seq.params, 64)
    engine.check_empty()


def test_row_of_a_stream_that_stopped_meanwhile_is_dropped_and_its_blocks_are_fenced() -> None:
    engine = EngineDouble(num_blocks=2, late=True, max_model_len=8, prefill_reserve=0.0)
    stop = expected_tokens([9, 9], greedy(1), 8)[0]
    seq = engine.sequence([9, 9], params=SamplingParams(max_tokens=6, stop_token_ids=(stop,)))
    engine.scheduler.add(seq)
    engine.step_overlapped()
    outcome = engine.step_overlapped()
    assert outcome is not None
    assert outcome.finished == [seq]
    assert engine.blocks.counts(0).free == 2
    assert not engine.blocks.can_reserve([2], for_transfer=True), "the plan in flight still writes there"
    last = engine.land()
    assert last is not None
    assert last.tokens == []
    assert engine.blocks.can_reserve([2], for_transfer=True)


def test_two_plans_may_be_unsettled_and_they_settle_in_order() -> None:
    engine = EngineDouble()
    engine.scheduler.add(engine.sequence([1, 2]))
    first, second = engine.scheduler.schedule(), engine.scheduler.schedule()
    with pytest.raises(AssertionError, match="two plans"):
        engine.scheduler.schedule()
    with pytest.raises(AssertionError, match="before plan 1"):
        engine.scheduler.settle(second, StepResult())
    assert isinstance(first.sequences[0].inputs, Literal)


# ---------------------------------------------------------------- prefix cache


def test_prefix_hit_of_a_computing_worker_ends_before_the_last_token() -> None:
    engine = EngineDouble()
    prompt = list(range(8))
    for prefix_hit in (0, 4):
        seq = engine.sequence(prompt, params=greedy(2))
        engine.scheduler.add(seq)
        plan = engine.step()[0]
        assert plan.sequences[0].start == seq.prefix_hit_tokens == prefix_hit
        engine.run()
    assert engine.emitted[1] == engine.emitted[2]


def test_prefix_shared_while_its_owner_runs() -> None:
    engine = EngineDouble(max_batched_tokens=16, chunk_tokens=16)
    first = engine.sequence(list(range(9)), params=greedy(9))
    engine.scheduler.add(first)
    engine.step()
    second = engine.sequence([*range(8), 40], params=greedy(1))
    engine.scheduler.add(second)
    engine.step()
    assert second.prefix_hit_tokens == 8
    engine.run()
    engine.check_empty()


def test_other_chain_root_hits_nothing() -> None:
    engine = EngineDouble()
    for root in (None, b"salt".ljust(16)):
        seq = engine.sequence(list(range(9)), params=greedy(1))
        seq.chain_root = root
        engine.scheduler.add(seq)
        engine.run()
        assert seq.prefix_hit_tokens == 0


# ---------------------------------------------------------------- preemption and order


def test_growth_preempts_the_latest_of_the_lowest_priority_and_loses_nothing() -> None:
    engine = EngineDouble(num_blocks=6, max_model_len=24, enable_prefix_cache=False)
    urgent = engine.sequence([1] * 7, priority=1, params=greedy(12))
    early = engine.sequence([2] * 7, params=greedy(12))
    late = engine.sequence([3] * 7, params=greedy(12))
    for seq in (late, early, urgent):
        engine.scheduler.add(seq)
    outcomes = engine.run()
    preempted = [seq for outcome in outcomes for seq in outcome.preempted]
    assert preempted[0] is late
    assert urgent.num_preemptions == 0
    finished = [seq for outcome in outcomes for seq in outcome.finished]
    assert finished == [urgent, early, late]
    for seq in finished:
        assert engine.emitted[seq.id] == expected_tokens(seq.tokens[:7], seq.params, 24)
    engine.check_empty()


def test_preempted_sequence_is_resumed_with_other_tables() -> None:
    engine = EngineDouble(num_blocks=4, max_model_len=16, enable_prefix_cache=False)
    engine.scheduler.add(engine.sequence([1] * 7, params=greedy(9)))
    engine.scheduler.add(engine.sequence([2] * 7, params=greedy(4)))
    plans = []
    while engine.scheduler.has_work:
        plans.append(engine.step()[0])
    assert [plan.preempted for plan in plans if plan.preempted] == [(2,)]
    resumed = [entry for plan in plans for entry in plan.resumed]
    assert [entry.id for entry in resumed] == [2]
    assert [new.id for plan in plans for new in plan.new] == [1, 2]


@pytest.mark.parametrize("held", [False, True])
def test_sequence_whose_blocks_free_nothing_is_no_victim(held: bool) -> None:
    engine = EngineDouble(num_blocks=5, max_model_len=16, enable_prefix_cache=False)
    first, second, third = (engine.sequence([n] * 4, params=greedy(9)) for n in (1, 2, 3))
    for seq in (first, second, third):
        engine.scheduler.add(seq)
    engine.step()
    pins = [(0, block) for block in third.block_tables[0]]
    engine.blocks.pin(pins)
    if held:  # the lease on it ran out
        engine.blocks.hold(pins)
        engine.blocks.unpin(pins)
    others = engine.blocks.reserve([2])
    assert others is not None
    outcome = engine.step()[1]
    assert outcome.preempted == [second]
    assert third.status is SequenceStatus.RUNNING
    (engine.blocks.unhold if held else engine.blocks.unpin)(pins)
    engine.blocks.release(0, others[0])
    engine.run()
    engine.check_empty()


def test_growth_without_any_victim_sits_out_and_goes_on_later() -> None:
    engine = EngineDouble(num_blocks=3, max_model_len=12)
    seq = engine.sequence([1] * 4, params=greedy(4))
    engine.scheduler.add(seq)
    engine.step()
    held = engine.blocks.reserve([2])
    assert held is not None
    assert engine.step()[0].sequences == ()
    assert (seq.status, seq.num_preemptions) == (SequenceStatus.RUNNING, 0)
    engine.blocks.release(0, held[0])
    engine.run()
    assert len(engine.emitted[seq.id]) == 4


def test_nobody_passes_a_waiting_sequence_that_found_no_room() -> None:
    engine = EngineDouble(num_blocks=6, max_model_len=24)
    running = engine.sequence([1] * 11, params=greedy(6))
    engine.scheduler.add(running)
    engine.step()
    large = engine.sequence([2] * 19, params=greedy(1))
    small = engine.sequence([3], params=greedy(1))
    engine.scheduler.add(large)
    engine.scheduler.add(small)
    engine.step()
    assert [seq.status for seq in (large, small)] == [SequenceStatus.WAITING] * 2
    later = engine.sequence([4], params=greedy(1))
    assert engine.scheduler.reserve_for_pull(later) is None, "a pull must not pass it either"
    engine.scheduler.abort(large)
    engine.step()
    assert small.is_finished
    assert engine.scheduler.reserve_for_pull(later) is not None


# ---------------------------------------------------------------- refusals and ends


def test_fixed_groups_are_reserved_whole_or_the_sequence_waits() -> None:
    engine = EngineDouble(extra_groups=(GroupCapacity("cross", 3, 4),))
    first = engine.sequence([1, 2], extents=(None, 5), params=greedy(3))
    second = engine.sequence([3, 4], extents=(None, 5), params=greedy(2))
    none = engine.sequence([5, 6], extents=(None, 0), params=greedy(2))
    for seq in (first, second, none):
        engine.scheduler.add(seq)
    plan = engine.step()[0]
    assert [len(table) for table in plan.new[0].block_tables] == [1, 2]
    assert engine.scheduler.num_waiting == 2, "one group is short, so none is reserved"
    assert engine.blocks.counts(0).filling == 1
    engine.run()
    assert all(seq.is_finished for seq in (second, none))
    engine.check_empty()


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "extent", "message"),
    [
        ([1] * 12, 1, 0, "12 tokens and 1 new are over max_model_len=12"),
        ([1] * 6, 100, 0, "11 tokens need 3 blocks of group self, over 2 blocks"),
        ([1, 2], 2, 5, "5 tokens need 2 blocks of group cross, over 1 blocks"),
    ],
)
def test_request_that_could_never_finish_is_refused(
    tokens: list[int], max_tokens: int, extent: int, message: str
) -> None:
    engine = EngineDouble(num_blocks=2, max_model_len=12, extra_groups=(GroupCapacity("cross", 1, 4),))
    seq = engine.sequence(tokens, extents=(None, extent), params=greedy(max_tokens))
    with pytest.raises(RequestTooLong, match=message):
        engine.scheduler.add(seq)
    assert not engine.scheduler.has_work
    engine.scheduler.abort(seq)
    engine.check_empty()


def test_request_without_anything_to_do_is_refused() -> None:
    engine = EngineDouble()
    with pytest.raises(InvalidRequest, match="0 prompt tokens"):
        engine.scheduler.add(engine.sequence([]))
    with pytest.raises(InvalidRequest, match="max_tokens=2 with 2 tokens emitted"):
        engine.scheduler.add(engine.sequence([1, 2, 3], num_prompt=1, params=greedy(2)))


def test_source_needs_room_for_its_input_only() -> None:
    engine = EngineDouble(num_blocks=2, max_model_len=100)
    engine.scheduler.add(engine.sequence([1] * 8, stop_after_first=True, params=greedy(90)))
    engine.run()
    engine.check_empty()


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_abort_at_any_time_frees_everything(steps: int) -> None:
    engine = EngineDouble(chunk_tokens=4)
    seq = engine.sequence(list(range(7)))
    engine.scheduler.add(seq)
    for _ in range(steps):
        engine.step()
    engine.scheduler.abort(seq)
    engine.scheduler.abort(seq)
    assert seq.finish is None
    assert not engine.scheduler.has_work
    assert engine.step()[0].finished == ((seq.id,) if steps else ())
    engine.check_empty()


def test_failed_plan_ends_its_rows_only_and_leaves_nothing_to_hit() -> None:
    engine = EngineDouble(max_sequences=1)
    bad, good = engine.sequence(list(range(9))), engine.sequence(list(range(9)), params=greedy(2))
    engine.scheduler.add(bad)
    engine.scheduler.add(good)
    plan = engine.scheduler.schedule()
    engine.rank.run(plan)
    assert engine.scheduler.abort_plan(plan) == [bad]
    assert engine.scheduler.settle(plan, StepResult()).tokens == []
    engine.run()
    assert good.prefix_hit_tokens == 0
    assert engine.emitted[good.id] == expected_tokens(list(range(9)), good.params, 64)
    engine.check_empty()


def test_counts_for_the_load_report() -> None:
    engine = EngineDouble(max_sequences=1, chunk_tokens=4)
    for length in (10, 3):
        engine.scheduler.add(engine.sequence([1] * length))
    assert engine.scheduler.queued_prefill_tokens == 13
    engine.step()
    counts = engine.scheduler.num_running, engine.scheduler.num_waiting, engine.scheduler.queued_prefill_tokens
    assert counts == (1, 1, 9)


@pytest.mark.parametrize(
    "wrong", [{"max_sequences": 17}, {"prefill_reserve": 1.0}, {"chunk_tokens": 0}, {"max_model_len": 1}]
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(EngineDouble().limits, **wrong)

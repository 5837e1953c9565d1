"""Outputs that come as hidden states: a step makes what decoders read of them, once, before the first that reads it."""

from __future__ import annotations

from cluster.request import SamplingParams
from tests.support.engine_builders import EngineDouble, expected_tokens
from workers.engine.block_manager import GroupCapacity
from workers.engine.sequence import Sequence
from workers.engine.step_plan import Projection, StepResult

LONG, SHORT = (6,) * 10, (7,) * 3  # 3 blocks and 1


def engine(num_fixed_blocks: int = 8, *, late: bool = False) -> EngineDouble:
    return EngineDouble(
        20,
        4,
        max_model_len=40,
        extra_groups=(GroupCapacity("cross", num_fixed_blocks, 4, is_fixed=True, is_projected=True),),
        max_encoder_tokens=40,
        late=late,
    )


def add(double: EngineDouble, tokens: tuple[int, ...], *, max_tokens: int = 3) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    seq = double.sequence([1, 2], encoder_tokens=tokens, params=params)
    double.scheduler.add(seq)
    return seq


def expect_whole(double: EngineDouble, *sequences: Sequence) -> None:
    double.run()
    for seq in sequences:
        assert double.emitted[seq.id] == expected_tokens(seq.tokens[: seq.num_prompt], seq.params, 40)
    double.check_empty()


def test_an_output_is_projected_once_and_not_by_who_only_encodes() -> None:
    double = engine()
    double.scheduler.add(double.sequence([], encoder_tokens=LONG, only_encodes=True))
    plan, _ = double.step()
    assert plan.encodes and not plan.projections
    first, equal, other = add(double, LONG), add(double, LONG), add(double, SHORT)
    plan, _ = double.step()
    assert [row.num_tokens for row in plan.projections] == [4, 4, 2], "two that come together share them"
    assert [row.id for row in plan.sequences] == [first.id, equal.id] and [row.id for row in plan.encodes] == [other.id]
    late = add(double, LONG)
    expect_whole(double, first, equal, other, late)
    assert double.rank.num_projected == 4


def test_what_a_failed_step_projected_is_projected_again() -> None:
    """Also where the next plan was made before it failed."""
    for is_overlapped in (False, True):
        double = engine(late=is_overlapped)
        double.scheduler.add(double.sequence([], encoder_tokens=LONG, only_encodes=True))
        double.step()
        failing = add(double, LONG, max_tokens=1)
        plan = double.scheduler.schedule()
        assert len(plan.projections) == 3
        double.rank.step += 1
        double.rank.known |= {new.id for new in plan.new}
        double.rank.tables |= {new.id: [list(table) for table in new.block_tables] for new in plan.new}
        following: list[Sequence] = []
        next_plan = None
        if is_overlapped:
            following.append(add(double, LONG))
            next_plan = double.scheduler.schedule()
            assert next_plan.projections == plan.projections
        assert double.scheduler.abort_plan(plan) == [failing]
        double.scheduler.settle(plan, StepResult())
        if next_plan is not None:
            double.settle(next_plan)
        following.append(add(double, LONG))
        expect_whole(double, *following)
        assert double.rank.num_projected == 3


def test_a_block_that_was_reused_is_another_one() -> None:
    """Evicted and read again, as a whole or in part."""
    double = engine(num_fixed_blocks=3)
    for tokens in (LONG, SHORT, LONG):
        seq = add(double, tokens)
        double.run()
        assert double.emitted[seq.id] == expected_tokens([1, 2], seq.params, 40)
    assert double.rank.num_projected == 3 + 1 + 3
    double.check_empty()


def test_what_a_sequence_projected_that_ended_before_its_step_did_is_not_trusted() -> None:
    double = engine(num_fixed_blocks=3, late=True)
    seq = add(double, LONG)
    double.step()
    plan = double.scheduler.schedule()
    rows = [Projection(1, block, count) for block, count in zip(seq.block_tables[1], (4, 4, 2), strict=True)]
    assert list(plan.projections) == rows
    double.scheduler.abort(seq)
    double.settle(plan)
    later = add(double, (9,) * 10)
    expect_whole(double, later)
    assert double.rank.num_projected == 6

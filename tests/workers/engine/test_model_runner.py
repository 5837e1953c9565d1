from __future__ import annotations

import torch

from cluster.request import SamplingParams
from tests.support.engines import BLOCK_SIZE, TinyEngine, limits
from tests.workers.engine.test_engine import prompts
from workers.engine.block_manager import BlockRaise
from workers.engine.model_runner import Launched
from workers.engine.step_plan import BlockCopy, Literal, NewSequence, ScheduledSequence, StepPlan, StepResult


def new(id_: int, blocks: tuple[int, ...]) -> NewSequence:
    return NewSequence(id_, 3, SamplingParams(max_tokens=8), (), (blocks,))


def test_two_steps_in_flight_read_the_tokens_of_the_previous_one() -> None:
    """The overlap that comes later: every plan is made and launched before the one before it has settled."""
    tiny = TinyEngine(num_blocks=60, scheduler_limits=limits(max_batched_tokens=20, max_sequences=8, chunk_tokens=8))
    given_ = prompts(6, longest=30)
    sequences = [tiny.add(prompt, max_tokens=5 + i) for i, prompt in enumerate(given_)]
    in_flight: list[tuple[StepPlan, Launched]] = []
    num_from_device = 0
    while tiny.scheduler.has_work or in_flight:
        if tiny.scheduler.has_work:
            plan = tiny.scheduler.schedule()
            num_from_device += sum(not isinstance(row.inputs, Literal) for row in plan.sequences)
            in_flight.append((plan, tiny.runner.launch(plan)))
        if len(in_flight) == 2 or not tiny.scheduler.has_work:
            plan, launched = in_flight.pop(0)
            tiny.outcomes.append(tiny.scheduler.settle(plan, launched.collect()))
    assert num_from_device > 10
    for i, (prompt, seq) in enumerate(zip(given_, sequences, strict=True)):
        assert tiny.emitted(seq) == tiny.model.greedy(prompt, 5 + i)


def test_generations_stand_in_the_table_before_the_model_runs() -> None:
    tiny = TinyEngine(num_blocks=20)
    for prompt in prompts(5, shortest=20, longest=40):
        tiny.add(prompt, max_tokens=10)
    tiny.run()
    expected = [tiny.blocks.generation(0, block) for block in range(1, 21)]
    assert tiny.generations.entries[1:] == expected
    assert max(expected) > 1, "no block was reused"


def test_a_raise_never_lowers_and_the_last_of_a_step_wins() -> None:
    tiny = TinyEngine()
    tiny.generations.entries[3] = 9  # a Pull brought it
    tiny.runner.execute(StepPlan(1, (), raises=(BlockRaise(0, 3, 8), BlockRaise(0, 4, 1), BlockRaise(0, 4, 2))))
    assert tiny.generations.entries[2:6] == [0, 9, 2, 0]


def test_copies_come_before_everything_else_of_the_step() -> None:
    tiny = TinyEngine()
    tiny.runner.execute(StepPlan(1, (ScheduledSequence(1, 0, 3, Literal((1, 2, 3)), True, ()),), new=(new(1, (5,)),)))
    copied = tiny.model.rows[5].clone()
    row = ScheduledSequence(2, 3, 1, Literal((4,)), True, ())
    tiny.runner.execute(StepPlan(2, (row,), new=(new(2, (6,)),), copies=(BlockCopy(0, 5, 6),)))
    assert torch.equal(tiny.model.rows[6][:3], copied[:3])
    assert not torch.equal(tiny.model.rows[6][3], tiny.model.rows[5][3])  # the fork went on in its own block


def test_a_plan_without_rows_runs_no_model_but_is_applied() -> None:
    tiny = TinyEngine()
    tiny.runner.execute(StepPlan(1, (ScheduledSequence(1, 0, 1, Literal((1,)), True, ()),), new=(new(1, (5,)),)))
    assert tiny.runner.execute(StepPlan(2, (), finished=(1,))) == StepResult()
    assert tiny.runner.num_sequences == 0
    assert len(tiny.model.batches) == 1


def test_a_step_that_samples_nothing_gives_no_tokens() -> None:
    tiny = TinyEngine()
    row = ScheduledSequence(1, 0, BLOCK_SIZE, Literal((1, 2, 3, 4)), False, ())
    assert tiny.runner.execute(StepPlan(1, (row,), new=(new(1, (5, 6)),))) == StepResult()
    row = ScheduledSequence(1, BLOCK_SIZE, 1, Literal((5,)), True, ())
    assert tiny.runner.execute(StepPlan(2, (row,))).tokens == {1: tiny.model.greedy([1, 2, 3, 4, 5], 1)[0]}

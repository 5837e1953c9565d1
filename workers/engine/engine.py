"""The step: one shard's scheduler and rank, put together."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from cluster.errors import WorkerFailed
from workers.engine.model_runner import Launched, ModelRunner
from workers.engine.scheduler import Scheduler
from workers.engine.step_plan import StepOutcome, StepPlan, StepResult


class BatchSize(NamedTuple):
    """What one step computed. `num_tokens` is 0 when it failed: nothing of it was confirmed."""

    num_sequences: int
    num_tokens: int
    num_encoder_tokens: int = 0
    num_drafts: int = 0  # of num_tokens


class Engine:
    """Engine thread only; the counters may be read from any thread.

    When a step raises, the sequences of its plan end, with `WorkerFailed` in the outcome; everybody else goes on, and
    so does the engine. None of their tokens were confirmed, so nothing of the step can be hit, leased or emitted.
    A row that cannot be sampled (its logits are not numbers, its grammar broke) ends its own sequence only.
    A caller that sees `num_failed_in_a_row` rise has a broken device, not a bad request.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self.num_steps = 0  # those without rows included
        self.num_failed_steps = 0
        self.num_failed_in_a_row = 0
        self.last_batch = BatchSize(0, 0)
        self.last_step_at = clock()  # end of the last step, seconds of `clock`

    @property
    def has_work(self) -> bool:
        """Whether a step may have something to do. False: wait for something to come in."""
        return self._scheduler.has_work

    def step(self) -> StepOutcome | None:
        """One step from plan to outcome. None: nothing could be scheduled, wait for something to come in."""
        plan = self._agree(self._scheduler.schedule())
        try:
            launched = self._runner.launch(plan)  # build and launch
        except Exception as error:  # noqa: BLE001 - the step owns whatever a model, a kernel or the device raises
            outcome, num_tokens = self._fail(plan, error), 0
        else:
            outcome, num_tokens = self._collect(plan, launched)
        self._count(plan, num_tokens)
        return outcome if plan.computes or outcome.preempted or outcome.encoded else None

    def _count(self, plan: StepPlan, num_tokens: int) -> None:
        self.num_steps += 1
        num_encoder_tokens = sum(len(row.tokens) for row in plan.encodes)
        self.last_batch = BatchSize(len(plan.sequences), num_tokens, num_encoder_tokens, plan.num_drafts)
        self.last_step_at = self._clock()

    def _collect(self, plan: StepPlan, launched: Launched) -> tuple[StepOutcome, int]:
        """Waits for a launched step and settles it: its outcome, and how many tokens it computed."""
        try:
            result = launched.collect()
        except Exception as error:  # noqa: BLE001 - as above: what a kernel raises may show up only here
            return self._fail(plan, error), 0
        self.num_failed_in_a_row = 0
        outcome = self._scheduler.settle(plan, result)
        if outcome.failed:
            reasons = sorted(set(result.failed.values()))
            outcome.error = WorkerFailed(f"step {plan.step} could not be sampled: {'; '.join(reasons)}")
        return outcome, plan.num_tokens

    def _agree(self, plan: StepPlan) -> StepPlan:
        """What several shards must do alike in this step. One shard agrees with itself."""
        return plan

    def _fail(self, plan: StepPlan, error: Exception) -> StepOutcome:
        """Ends the sequences of the plan, then settles it: its place in the order of plans must be taken."""
        self.num_failed_steps += 1
        self.num_failed_in_a_row += 1
        self._runner.drain()
        failed = self._scheduler.abort_plan(plan)
        outcome = self._scheduler.settle(plan, StepResult())
        outcome.failed = failed
        outcome.error = WorkerFailed(f"step {plan.step} failed on the worker: {type(error).__name__}: {error}")
        outcome.error.__cause__ = error  # for whoever logs it
        return outcome

"""The step with the next one prepared while it runs: the host schedules and launches step n + 1, then waits for n."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from workers.engine.engine import BatchSize, Engine
from workers.engine.model_runner import Launched, ModelRunner
from workers.engine.scheduler import Scheduler
from workers.engine.step_plan import StepOutcome, StepPlan


class _Flight(NamedTuple):
    plan: StepPlan
    launched: Launched | Exception  # what the launch raised is this step's own failure


class OverlappedEngine(Engine):
    """An `Engine` of which at most two steps are launched and not settled.

    Tokens go from step to step on the device; stops apply one step late, and what was drawn past them is dropped by
    the scheduler. An outcome is that of the step before the one that was launched.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(scheduler, runner, clock=clock)
        self._flights: deque[_Flight] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self._flights) or self._scheduler.has_work

    def step(self) -> StepOutcome | None:
        """Launches one step, settles the one before it. None: nothing was scheduled and nothing was in flight."""
        if self._scheduler.has_work:
            plan = self._agree(self._scheduler.schedule())
            try:
                launched = self._runner.launch(plan)
            except Exception as error:  # noqa: BLE001 - the step owns whatever a model, a kernel or the device raises
                launched = error
            self._flights.append(_Flight(plan, launched))
            if len(self._flights) < 2 and plan.computes:
                self.last_batch = BatchSize(0, 0)
                return StepOutcome(plan.step)  # nothing is known yet
        if not self._flights:
            return None
        return self._settle(self._flights.popleft())

    def _settle(self, flight: _Flight) -> StepOutcome | None:
        plan, launched = flight
        if isinstance(launched, Exception):
            outcome, num_tokens = self._fail(plan, launched), 0
        else:
            outcome, num_tokens = self._collect(plan, launched)
        self._count(plan, num_tokens)
        return outcome if plan.computes or outcome.preempted or outcome.encoded or self._flights else None

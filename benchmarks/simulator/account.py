"""How much a simulated worker has to do, as workers/workload.py counts it: for its reports and for the autoscaler."""

from __future__ import annotations

from collections.abc import Collection

from cluster.autoscaler import WorkerLoad
from cluster.config import Role
from cluster.protos import worker_pb2 as pb
from workers.engine.step_plan import StepPlan
from workers.rate import Rate


class Account:
    def __init__(self, max_sequences: int, now: float) -> None:
        self.rate = Rate()  # prompt tokens
        self._max_sequences = max_sequences
        self._told_at = now
        self._num_steps = self._num_begun = 0  # since then, and so on
        self._step_s = self._prompt_s = self._waited_s = 0.0

    def stepped(self, plan: StepPlan, seconds: float) -> None:
        self._num_steps += 1
        self._step_s += seconds
        if plan.num_tokens >= 2 * len(plan.sequences):  # prompts, not one token each
            self.rate.measured(plan.num_tokens, seconds)
            self._prompt_s += seconds

    def began(self, waited_s: float) -> None:
        """The first chunk of a prompt is computed, so long after it came."""
        self._num_begun += 1
        self._waited_s += waited_s

    def tell(self, report: pb.LoadReport, roles: Collection[Role], now: float) -> WorkerLoad:
        """What happened since it was told last, and what `report` says of now."""
        elapsed_s = max(now - self._told_at, 1e-3)
        places = (report.num_waiting + report.num_running + report.num_pulling) / self._max_sequences
        blocks = [(g.filling + g.ready + g.quarantined) / g.num_blocks for g in report.groups]
        load = WorkerLoad(
            roles=frozenset(roles),
            busy=min(1.0, self._prompt_s / elapsed_s),
            backlog_s=report.queued_prefill_tokens / self.rate.per_s if self.rate.per_s else 0.0,
            queue_s=self._waited_s / self._num_begun if self._num_begun else 0.0,
            occupancy=max(places, *blocks),
            inter_token_s=self._step_s / self._num_steps if self._num_steps else 0.0,
        )
        self._told_at = now
        self._num_steps = self._num_begun = 0
        self._step_s = self._prompt_s = self._waited_s = 0.0
        return load

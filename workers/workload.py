"""How much a worker has to do: what its steps tell, and the account of it that the controller asks for."""

from __future__ import annotations

from collections.abc import Collection

from cluster.autoscaler import WorkerLoad
from cluster.config import Role
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from workers.engine.engine import BatchSize
from workers.engine.step_plan import StepOutcome
from workers.rate import Rate


class Workload:
    """Engine thread only."""

    def __init__(self, metrics: Metrics, max_sequences: int, now: float) -> None:
        self._metrics = metrics
        self._max_sequences = max_sequences
        self._prefill_rate = Rate()
        self._told_at = now
        self._num_steps = 0  # since then, and so on
        self._step_s = 0.0
        self._prompt_s = 0.0
        self._queue_s, self._num_queued = 0.0, 0.0  # over all time

    @property
    def prefill_tokens_per_s(self) -> float:
        """0: nothing was measured."""
        return self._prefill_rate.per_s

    def stepped(self, batch: BatchSize, outcome: StepOutcome, seconds: float) -> None:
        self._num_steps += 1
        self._step_s += seconds
        if 0 < batch.num_tokens - batch.num_drafts >= 2 * batch.num_sequences:  # prompts, not one token each
            self._prefill_rate.measured(batch.num_tokens, seconds)
            self._prompt_s += seconds
        metrics = self._metrics
        metrics.step.observe(seconds)
        metrics.batch_size.observe(batch.num_sequences)
        metrics.computed_tokens.inc(batch.num_tokens)
        metrics.encoder_tokens.inc(batch.num_encoder_tokens)
        metrics.sampled_tokens.inc(len(outcome.tokens) + outcome.num_searched_tokens)
        metrics.drafted_rows.inc(outcome.num_drafted_rows)
        metrics.draft_tokens.inc(outcome.num_drafts)
        metrics.accepted_draft_tokens.inc(outcome.num_accepted_drafts)
        metrics.preemptions.inc(len(outcome.preempted))

    def tell(self, report: pb.LoadReport, roles: Collection[Role], now: float) -> WorkerLoad:
        """What happened since it was told last, and what `report` says of now."""
        elapsed_s = max(now - self._told_at, 1e-3)
        rate = self.prefill_tokens_per_s
        places = (report.num_waiting + report.num_running + report.num_pulling) / self._max_sequences
        blocks = [(g.filling + g.ready + g.quarantined) / g.num_blocks for g in report.groups if g.num_blocks]
        load = WorkerLoad(
            roles=frozenset(roles),
            busy=min(1.0, self._prompt_s / elapsed_s),
            backlog_s=report.queued_prefill_tokens / rate if rate else 0.0,
            queue_s=self._queued(),
            occupancy=max(places, *blocks) if blocks else places,
            inter_token_s=self._step_s / self._num_steps if self._num_steps else 0.0,
        )
        self._told_at = now
        self._num_steps, self._step_s, self._prompt_s = 0, 0.0, 0.0
        return load

    def _queued(self) -> float:
        """Mean wait of the prompts that began since the last time."""
        labels = {"stage": "prefill"}
        seconds = self._metrics.value("sluice_engine_queue_seconds_sum", labels)
        count = self._metrics.value("sluice_engine_queue_seconds_count", labels)
        waited_s, num_begun = seconds - self._queue_s, count - self._num_queued
        self._queue_s, self._num_queued = seconds, count
        return waited_s / num_begun if num_begun else 0.0

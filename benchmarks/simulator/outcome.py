"""From records to the figures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report import percentile
from benchmarks.simulator.cluster import Record


@dataclass(frozen=True, slots=True)
class Objective:
    """What a request must keep to count as good."""

    ttft_s: float
    gap_s: float  # between two tokens, mean of the request

    def kept_by(self, record: Record) -> bool:
        return record.complete and record.ttft_s <= self.ttft_s and record.mean_gap_s <= self.gap_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One policy under one load. Requests that arrived in the time that counts; seconds."""

    policy: str
    rate: float  # requests/s that arrived
    num_requests: int
    num_refused: int
    hit_rate: float  # of prompt tokens: not computed, as they were cached there
    fetch_rate: float  # nor computed, as they were fetched from another cache
    ttft_p50: float
    ttft_p99: float
    gap_p50: float
    gap_p99: float
    goodput: float  # requests/s that kept the objective

    @classmethod
    def of(cls, policy: str, records: Sequence[Record], objective: Objective, *, from_s: float, to_s: float) -> Outcome:
        """Requests that arrived from `from_s` on and before `to_s`."""
        counted = [record for record in records if from_s <= record.at_s < to_s]
        done = [record for record in counted if record.complete]
        first, gaps = [record.ttft_s for record in done], [record.mean_gap_s for record in done]
        num_tokens = sum(record.request.num_input for record in done)
        span_s = to_s - from_s
        return cls(
            policy=policy,
            rate=len(counted) / span_s,
            num_requests=len(counted),
            num_refused=sum(record.refused for record in counted),
            hit_rate=sum(record.hit_tokens for record in done) / num_tokens if num_tokens else 0.0,
            fetch_rate=sum(record.fetched_tokens for record in done) / num_tokens if num_tokens else 0.0,
            ttft_p50=percentile(first, 0.5),
            ttft_p99=percentile(first, 0.99),
            gap_p50=percentile(gaps, 0.5),
            gap_p99=percentile(gaps, 0.99),
            goodput=sum(objective.kept_by(record) for record in counted) / span_s,
        )

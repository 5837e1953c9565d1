"""From what clients saw to the figures of serving: time to first token, inter-token latency, throughput, goodput."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.client import Sample
from benchmarks.report import percentile


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count as good."""

    ttft_s: float
    inter_token_s: float  # mean of the request

    def kept_by(self, sample: Sample) -> bool:
        return sample.complete and sample.token_s[0] <= self.ttft_s and sample.mean_gap <= self.inter_token_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One mode at one rate, all rounds together. Seconds; percentiles over the complete requests, 0 without any."""

    mode: str
    rate: float  # offered requests/s; 0: one request after the other
    num_requests: int
    num_failed: int
    num_good: int
    ttft_p50: float
    ttft_p99: float
    inter_token_p50: float  # of the means of the requests: (last token - first) / (tokens - 1)
    inter_token_p99: float
    gap_p99: float  # of all pauses between two tokens of a stream, as they arrive; 0 where the driver keeps no times
    end_to_end_p50: float
    end_to_end_p99: float
    elapsed: float  # from the start to the last token, all arrivals included
    num_tokens: int
    hit_tokens: int  # 0, or cached requests stand beside cold ones
    pulled_blocks: int
    num_disaggregated: int  # plans
    late_p99: float  # how far the client itself was behind
    neighbours: float  # cores that other programs kept busy meanwhile
    driver: str = ""  # who sent the requests; "": there is only one

    @classmethod
    def of(
        cls,
        mode: str,
        rate: float,
        rounds: Sequence[Sequence[Sample]],
        slo: Slo,
        *,
        neighbours: float = 0.0,
        driver: str = "",
    ) -> Summary:
        samples = [sample for round_ in rounds for sample in round_]
        done = [sample for sample in samples if sample.complete]
        gaps = [gap for sample in done for gap in sample.gaps]
        means = [sample.mean_gap for sample in done if sample.count > 1]
        first, last = [sample.token_s[0] for sample in done], [sample.token_s[-1] for sample in done]
        return cls(
            mode=mode,
            rate=rate,
            num_requests=len(samples),
            num_failed=len(samples) - len(done),
            num_good=sum(slo.kept_by(sample) for sample in done),
            ttft_p50=percentile(first, 0.5),
            ttft_p99=percentile(first, 0.99),
            inter_token_p50=percentile(means, 0.5),
            inter_token_p99=percentile(means, 0.99),
            gap_p99=percentile(gaps, 0.99),
            end_to_end_p50=percentile(last, 0.5),
            end_to_end_p99=percentile(last, 0.99),
            elapsed=sum(_elapsed(rate, round_) for round_ in rounds),
            num_tokens=sum(sample.count for sample in done),
            hit_tokens=sum(sample.hit_tokens for sample in done),
            pulled_blocks=sum(sample.pulled_blocks for sample in done),
            num_disaggregated=sum(sample.plan == "disaggregated" for sample in done),
            late_p99=percentile([sample.sent_s for sample in samples], 0.99),
            neighbours=neighbours,
            driver=driver,
        )

    @property
    def label(self) -> str:
        """Of its curve."""
        return f"{self.mode}, {self.driver}" if self.driver else self.mode

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.elapsed if self.elapsed else 0.0

    @property
    def requests_per_s(self) -> float:
        return (self.num_requests - self.num_failed) / self.elapsed if self.elapsed else 0.0

    @property
    def goodput(self) -> float:
        """Requests/s that kept the objectives."""
        return self.num_good / self.elapsed if self.elapsed else 0.0


def _elapsed(rate: float, samples: Sequence[Sample]) -> float:
    done = [sample for sample in samples if sample.complete]
    if not rate:
        return sum(sample.token_s[-1] for sample in done)
    return max([len(samples) / rate, *(sample.due_s + sample.token_s[-1] for sample in done)])

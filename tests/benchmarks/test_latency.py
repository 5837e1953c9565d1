import pytest

from benchmarks.client import Sample
from benchmarks.latency import Slo, Summary
from benchmarks.report import Figure, percentile

SLO = Slo(ttft_s=0.5, inter_token_s=0.1)


def sample(due_s: float, *token_s: float, num_wanted: int | None = None, error: str = "") -> Sample:
    return Sample(
        due_s,
        10,
        len(token_s) if num_wanted is None else num_wanted,
        token_s=list(token_s),
        error=error,
        plan="aggregated",
    )


def test_a_summary_counts_what_clients_saw() -> None:
    samples = [
        sample(0.0, 0.2, 0.25, 0.3),  # good
        sample(1.0, 0.6, 0.65, 0.7),  # its first token came too late
        sample(2.0, 0.2, 0.5, 0.8),  # its tokens came too slowly
        sample(3.0, 0.4),  # good: one token has no pause
        sample(3.5, 0.1, num_wanted=2),  # cut short
        sample(3.6, error="busy"),
    ]
    summary = Summary.of("mode", 2.0, [samples], SLO)
    assert (summary.num_requests, summary.num_failed, summary.num_good) == (6, 2, 2)
    assert summary.num_tokens == 10
    assert summary.elapsed == pytest.approx(3.4)  # the last token; all arrivals were due within 3 s
    assert summary.goodput == pytest.approx(2 / 3.4)
    assert summary.requests_per_s == pytest.approx(4 / 3.4)
    assert summary.tokens_per_s == pytest.approx(10 / 3.4)
    assert summary.ttft_p50 == pytest.approx(0.4) and summary.ttft_p99 == pytest.approx(0.6)
    assert summary.inter_token_p99 == summary.gap_p99 == pytest.approx(0.3)
    assert summary.end_to_end_p99 == pytest.approx(0.8)


def test_goodput_is_never_over_what_was_offered() -> None:
    summary = Summary.of("mode", 2.0, [[sample(0.1, 0.01), sample(0.2, 0.01)]], SLO)
    assert summary.goodput == summary.rate == 2.0


def test_rounds_add_up() -> None:
    rounds = [[sample(0.1, 0.2), sample(0.2, 1.9)], [sample(0.1, 0.2), sample(0.2, 0.3)]]
    summary = Summary.of("mode", 2.0, rounds, SLO)
    assert summary.num_requests == 4
    assert summary.elapsed == pytest.approx(2.1 + 1.0)


def test_one_after_the_other_takes_the_sum_of_all() -> None:
    summary = Summary.of("mode", 0.0, [[sample(0.0, 0.25), sample(0.0, 0.5)], [sample(0.0, 0.25)]], SLO)
    assert summary.elapsed == 1.0


def test_nothing_complete_is_all_zeros() -> None:
    summary = Summary.of("mode", 4.0, [[sample(0.0, error="refused")] * 2], SLO)
    assert (summary.num_failed, summary.goodput, summary.ttft_p99, summary.tokens_per_s) == (2, 0.0, 0.0, 0.0)


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(v) for v in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 51, 100, 100]


def test_a_ratio_is_the_share_of_the_bound_whichever_way_is_better() -> None:
    assert Figure("rate", 5.0, "GB/s", bound=10.0).ratio == 0.5
    assert Figure("time", 5.0, "ms", bound=2.5, less_is_better=True).ratio == 0.5
    assert Figure("time", 5.0, "ms").ratio is None

"""Costs of steps: what is fitted is what steps were made of; what a comparison counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from benchmarks.simulator.calibration import StepTimes
from benchmarks.simulator.cluster import Record, Setup
from benchmarks.simulator.comparison import compare
from benchmarks.simulator.outcome import Objective, Outcome
from benchmarks.simulator.step_cost import COSTS, StepCost
from benchmarks.simulator.trace import TraceRequest
from cluster.config import Role
from workers.engine.step_plan import Literal, ScheduledSequence

COST = COSTS["h200-8b"]


def row(start: int, num_tokens: int) -> ScheduledSequence:
    return ScheduledSequence(1, start, num_tokens, Literal((0,) * num_tokens), True, ())


def test_the_fit_finds_the_costs_that_steps_were_made_of() -> None:
    draw = Random(0)
    steps = [
        [row(draw.randrange(5000), draw.choice((1, 1, 1, 64, 300))) for _ in range(draw.randint(1, 12))]
        for _ in range(60)
    ]
    seconds = np.array([COST.step_s(rows) for rows in steps])
    found, error = StepTimes(steps, seconds, block_bytes=1).fit()
    expected = (COST.fixed, COST.prompt_token, COST.attention, COST.sequence, COST.context_token)
    assert found == pytest.approx(expected, rel=1e-6) and error < 1e-9
    free = replace(COST, sequence=0.0, fixed=0.0)
    noisy = np.array([free.step_s(rows) * draw.uniform(0.8, 1.2) for rows in steps])
    found, error = StepTimes(steps, noisy, block_bytes=1).fit()
    assert (found >= 0).all() and error < 0.2


def test_a_step_costs_what_its_rows_cost(tmp_path: Path) -> None:
    assert COST.step_s([]) == COST.fixed
    chunk = 100 * (COST.prompt_token + COST.attention * 250)
    assert COST.step_s([row(200, 100)]) == pytest.approx(COST.fixed + chunk)
    assert COST.step_s([row(200, 100), row(999, 1)]) == pytest.approx(
        COST.fixed + chunk + COST.sequence + 999 * COST.context_token
    )
    assert COST.read_s(10) == pytest.approx(COST.read + 10 * COST.block_bytes / COST.bytes_per_s)
    COST.save(tmp_path / "cost.json")
    assert StepCost.load(tmp_path / "cost.json") == COST


def test_what_counts_is_what_arrived_in_the_time_that_counts() -> None:
    request = TraceRequest(0, 100, 3, ())
    early = Record(request, 0.5, 0.6, 0.7, 3)
    good = Record(request, 1.0, 1.1, 1.3, 3, hit_tokens=50, fetched_tokens=10)
    late = Record(request, 2.0, 4.0, 4.2, 3)
    refused = Record(request, 2.5, refused=True)
    outcome = Outcome.of("p", [early, good, late, refused], Objective(ttft_s=1.0, gap_s=0.2), from_s=1.0, to_s=3.0)
    assert (outcome.num_requests, outcome.num_refused, outcome.rate, outcome.goodput) == (3, 1, 1.5, 0.5)
    assert (outcome.hit_rate, outcome.fetch_rate) == (0.25, 0.05)
    assert (outcome.ttft_p50, outcome.ttft_p99) == (pytest.approx(2.0), pytest.approx(2.0))


def test_a_comparison_runs_every_policy_at_every_speed() -> None:
    setup = Setup(num_workers={Role.PREFILL: 1, Role.DECODE: 1}, cost=COST, num_blocks=400)
    trace = [TraceRequest(100 * number, 700, 3, (0, number + 1)) for number in range(10)]
    outcomes = compare(setup, trace, [1.0, 2.0], ["kv_aware", "round_robin"], Objective(ttft_s=1.0, gap_s=0.1))
    assert [each.policy for each in outcomes] == ["kv_aware", "round_robin"] * 2
    slow, fast = outcomes[0], outcomes[2]
    assert fast.rate == pytest.approx(2 * slow.rate) and slow.hit_rate > 0.5
    assert all(each.goodput == each.rate for each in outcomes)

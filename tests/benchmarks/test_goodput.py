"""The goodput benchmark: which requests are good, what is compared with what, and that all of it runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import goodput
from benchmarks.arrivals import Workload
from benchmarks.client import Sample
from benchmarks.goodput import Found
from benchmarks.goodput_scenario import App, Objectives, scenarios
from benchmarks.latency import Summary

TINY = scenarios()["tiny"]


def sample(due_s: float, first_s: float, *gaps_s: float) -> Sample:
    token_s = [first_s]
    for gap_s in gaps_s:
        token_s.append(token_s[-1] + gap_s)
    return Sample(due_s, 10, len(token_s), token_s=token_s)


def test_the_worst_pauses_count_and_not_their_mean() -> None:
    objectives = Objectives(ttft_s=1.0, inter_token_s=0.010)
    assert objectives.kept_by(sample(0.0, 1.0, 0.009, 0.009))
    assert not objectives.kept_by(sample(0.0, 1.1, 0.009))
    assert not objectives.kept_by(sample(0.0, 0.5, 0.001, 0.001, 0.020))
    assert objectives.kept_by(sample(0.0, 0.5, 0.020, *[0.005] * 150)), "one in a hundred"
    assert not objectives.kept_by(sample(0.0, 0.5, 0.020, 0.020, *[0.005] * 150))
    cut = sample(0.0, 0.5)
    cut.num_wanted = 2
    assert not objectives.kept_by(cut)


def found(app: App, goods: dict[float, int], gap_s: float) -> Found:
    """Ten requests in a second at each rate, of which so many are good."""
    objectives = Objectives(1.0, 0.010)
    by_rate = {
        rate: Summary.of(
            app.label, rate, [[sample(0.0, 0.2 if i < num_good else 2.0, gap_s) for i in range(10)]], objectives
        )
        for rate, num_good in goods.items()
    }
    return Found(app, [sample(0.0, 0.030)], by_rate)


def test_the_best_budget_of_each_rate_stands_beside_the_disaggregated_mode(tmp_path: Path) -> None:
    scenario = replace(TINY, rates=(10.0, 20.0), budgets=(64, 256))
    own, small, large = scenario.apps(tmp_path)
    founds = [
        found(own, {10.0: 10, 20.0: 9}, 0.004),
        found(small, {10.0: 8, 20.0: 2}, 0.008),
        found(large, {10.0: 6, 20.0: 4}, 0.009),
    ]
    figures = {figure.name: figure for figure in goodput.figures(scenario, founds, [0.020])}
    assert figures["added TTFT, p50"].value == pytest.approx(10.0)
    assert figures["aggregated, 10 requests/s: goodput"].note == "aggregated, 64"
    assert figures["aggregated, 20 requests/s: goodput"].note == "aggregated, 256"
    assert figures["10 requests/s: ITL p99, ratio"].value == pytest.approx(0.5)
    assert figures["20 requests/s: ITL p99, ratio"].value == pytest.approx(4 / 9)
    most = [figures[f"{mode}: most goodput"].value for mode in ("disaggregated", "aggregated")]
    assert figures["goodput, ratio"].value == pytest.approx(most[0] / most[1])
    founds[1].by_rate.clear()
    del founds[2].by_rate[20.0]
    assert "20 requests/s: ITL p99, ratio" not in {each.name for each in goodput.figures(scenario, founds, [0.020])}


@pytest.mark.parametrize("scenario", scenarios().values(), ids=lambda each: each.name)
def test_every_app_of_every_scenario_has_a_valid_config(scenario: goodput.Scenario, tmp_path: Path) -> None:
    own, *others = scenario.apps(tmp_path)
    assert [app.budget for app in others] == list(scenario.budgets)
    assert [app.config.scheduler.max_batched_tokens for app in others] == list(scenario.budgets)
    assert set(own.config.pools) == {"prefill", "decode"} and own.config.router.local_prefill == "never"
    assert all(app.config.pools["mixed"].workers == 2 for app in others)
    gpus = {pool.gpus for app in (own, *others) for pool in app.config.pools.values()}
    assert gpus == ({0.0} if scenario.name == "tiny" else {1.0})
    assert scenario.long_tokens[1] + scenario.output_tokens[1] <= scenario.max_model_len


def test_two_workers_share_a_card(tmp_path: Path) -> None:
    apps = replace(scenarios()["v2-lite"], gpus=0.5).apps(tmp_path)
    assert {pool.gpus for app in apps for pool in app.config.pools.values()} == {0.5}


def test_about_so_many_prompts_are_long_and_others_are_as_they_were() -> None:
    short = Workload(rate=5, num_requests=400, prompt_tokens=(1, 9), output_tokens=(1, 2), vocab_size=50, seed=0)
    mixed = replace(short, long_prompt_tokens=(100, 120), long_share=0.3)
    lengths = [len(arrival.prompt) for arrival in mixed.arrivals()]
    assert 90 < sum(100 <= length <= 120 for length in lengths) < 150
    assert all(length <= 9 or length >= 100 for length in lengths)
    assert [arrival.at_s for arrival in mixed.arrivals()] == [arrival.at_s for arrival in short.arrivals()]


@pytest.mark.full
@pytest.mark.cluster
@pytest.mark.timeout(180)
def test_the_whole_sweep(tmp_path: Path) -> None:
    """Two clusters side by side; their figures mean nothing."""
    scenario = replace(
        TINY,
        rates=(8.0, 16.0),
        budgets=(256,),
        seconds=0.5,
        warm_up_seconds=0.5,
        num_alone=4,
        objectives=Objectives(60.0, 60.0),
        apps_at_once=2,
    )
    report = goodput.run(scenario, 120.0, tmp_path / "goodput.json", tmp_path / "goodput.png")
    report.show()
    tree = json.loads((tmp_path / "goodput.json").read_text())
    assert tree["setting"]["commit"] and tree["setting"]["versions"] and not tree["details"]["left_out"]
    runs = [(run["mode"], run["rate"], run["num_good"], run["num_failed"]) for run in tree["details"]["runs"]]
    assert runs == [
        ("disaggregated", 8, 4, 0),
        ("disaggregated", 16, 8, 0),
        ("aggregated, 256", 8, 4, 0),
        ("aggregated, 256", 16, 8, 0),
    ]
    assert [run["num_disaggregated"] for run in tree["details"]["runs"]] == [4, 8, 0, 0]
    assert (tmp_path / "goodput.png").read_bytes().startswith(b"\x89PNG")

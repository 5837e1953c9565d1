"""Every benchmark that starts processes, at a size at which its figures mean nothing: does it run, and report all?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import failures, jitter, overhead, serving, sessions, transfer, words
from benchmarks.checkpoint import TINY
from benchmarks.latency import Slo
from benchmarks.report import Report

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


def written(report: Report, path: Path) -> dict[str, float]:
    """Figures by name, as read back from the file."""
    report.show()
    report.write(path)
    tree = json.loads(path.read_text())
    assert set(tree) == {"benchmark", "what", "arguments", "setting", "figures", "details"}
    assert {"cpu", "num_cpus", "commit", "versions", "load"} <= set(tree["setting"])
    assert {"name", "value", "unit", "bound", "ratio"} <= set(tree["figures"][0])
    assert len({figure["name"] for figure in tree["figures"]}) == len(tree["figures"])
    return {figure["name"]: figure["value"] for figure in tree["figures"]}


def test_transfer(tmp_path: Path) -> None:
    shape = transfer.Shape(tokens=256, layers=2)
    assert (shape.num_blocks, shape.num_bytes) == (4, 256 * 2 * 576 * 2)
    report = transfer.run(["cma", "loopback"], shape, repeats=1)
    figures = written(report, tmp_path / "report.json")
    kinds = ("warm", "warm, blocks in order", "cold", "as a worker warms up")
    assert list(figures) == [f"{transport}, {kind}" for transport in ("cma", "loopback") for kind in kinds]
    assert all(value > 0 for value in figures.values())
    assert all(figure.bound for figure in report.figures if not figure.name.endswith("warms up"))


def test_words(tmp_path: Path) -> None:
    figures = written(words.run(5, 4, 8), tmp_path / "report.json")
    assert list(figures) == ["round trip, p50", "round trip, p99", "tokens"]
    assert all(value > 0 for value in figures.values())


def test_sessions(tmp_path: Path) -> None:
    figures = written(sessions.run(2, 4, 2, 0.5, 10.0), tmp_path / "report.json")
    assert figures["tokens"] > 0 and figures["all sessions open"] > 0 and figures["last notice"] > 0
    assert figures["last notice"] >= figures["first notice"] and len(figures) == 11


@pytest.mark.full
def test_jitter() -> None:
    load = jitter.Load(num_streams=4, num_steps=100, shape=TINY)
    measured = jitter.measure(load)
    assert 0 < len(measured.alone.intervals) < 100
    assert 0 < len(measured.served.intervals) < 100
    assert 0 < len(measured.gaps) <= 4 * 99
    assert all(
        inside <= whole for inside, whole in zip(measured.served.durations, measured.served.intervals, strict=True)
    )
    assert len(jitter.figures(measured)) == 11
    assert set(jitter.details(measured)) >= {"load", "model", "served_intervals_s"}


@pytest.mark.full
def test_serving(tmp_path: Path) -> None:
    plan = serving.Plan(
        rates=(16.0,),
        seconds=0.25,
        num_rounds=1,
        num_alone=1,
        prompt_tokens=(65, 90),  # more than a block
        output_tokens=(2, 4),
        slo=Slo(60.0, 60.0),
        shape=TINY,
        vocab_size=TINY.vocab_size,
    )
    report, summaries = serving.run(plan)
    assert [(s.mode, s.rate, s.num_requests) for s in summaries] == [
        ("disaggregated", 0, 1),
        ("disaggregated", 16, 4),
        ("aggregated", 0, 1),
        ("aggregated", 16, 4),
    ]
    assert [s.num_disaggregated for s in summaries] == [1, 4, 0, 0]
    assert [s.num_good for s in summaries] == [1, 4, 1, 4]
    assert all(s.num_failed == s.hit_tokens == 0 for s in summaries)
    assert [s.pulled_blocks >= s.num_requests for s in summaries] == [True, True, False, False]
    assert (
        summaries[1].num_tokens
        == summaries[3].num_tokens
        == sum(arrival.num_tokens for arrival in plan.workload(16.0, 0).arrivals())
    )
    figures = written(report, tmp_path / "report.json")
    gaps = {name for name in figures if name.endswith("gap p99")}  # where two tokens came together, there is none
    assert len(figures.keys() - gaps) == 2 * (7 + 8)
    assert serving.table_of(report, summaries).row_count == 4
    serving.draw(tmp_path / "serving.png", report, summaries, plan)
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_overhead(tmp_path: Path) -> None:
    """Cached prompts, wrong token counts and failed requests end the run."""
    plan = overhead.Plan(num_requests=3, num_warmup=1, prompt_tokens=(65, 90), num_tokens=2, shape=TINY)
    report = overhead.run(plan)
    figures = written(report, tmp_path / "report.json")
    added, lone, public = (figures[f"{name}, p50"] for name in ("added TTFT", *_TTFT))
    assert added == pytest.approx(public - lone) and lone > 0 and public > 0
    assert [figure.bound for figure in report.figures if figure.name.startswith("added TTFT")] == [10.0, 10.0]
    rounds = report.details["rounds_s"]
    assert isinstance(rounds, list) and len(rounds) == 3
    assert all(
        0 < one["public_server"] < one["public"] and 0 < one["replica_server"] < one["replica"] for one in rounds
    )


_TTFT = ("TTFT of the lone engine", "TTFT at the public port")


@pytest.mark.full
def test_failures() -> None:
    """Two silences of one kind: notices that the first one left are none of the second."""
    noticed = failures.measure(1, 2, loaded=True)
    numbers = {what: len(seconds) for what, seconds in noticed.items()}
    assert numbers.pop("cut", 6) == 6  # left out without root and namespaces
    assert numbers == {"prefill killed": 2, "decode killed": 1, "frozen": 6, "process ended": 2}
    assert all(0 < second < failures.NOTICED_S for seconds in noticed.values() for second in seconds)
    bounds = {figure.name: figure.bound for figure in failures.figures(noticed, loaded=True)}
    assert bounds["prefill killed, loaded, p99"] == 500 and bounds["frozen, loaded, worst"] == 2000

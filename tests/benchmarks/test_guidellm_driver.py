"""What guidellm is told, and what its report is read as. The reports are those of guidellm 0.8.1, shortened."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.arrivals import Workload
from benchmarks.client import Endpoint, Sample
from benchmarks.guidellm_driver import ensure, read, send
from benchmarks.latency import Slo, Summary

WORDS = {7: " red", 8: " green"}
WORKLOAD = Workload(
    rate=4.0, num_requests=3, prompt_tokens=(2, 5), output_tokens=(2, 4), vocab_size=9, seed=2**40 + 3, words=WORDS
)
ENDPOINT = Endpoint("http://127.0.0.1:1", "tiny")

# Stands where guidellm does: says what it was told, and leaves the report that lies beside it.
PROGRAM = """#!{python}
import json, os, pathlib, shutil, sys
told = {{"words": sys.argv[1:], "workers": os.environ["GUIDELLM__MAX_WORKER_PROCESSES"]}}
here = pathlib.Path(__file__).parent
(here / "told.json").write_text(json.dumps(told))
shutil.copy("requests.jsonl", here)
print("a word of its log")
if not (here / "answer.json").exists():
    sys.exit(3)
shutil.copy(here / "answer.json", "report.json")
"""


def request(
    wanted: int, targeted: float | None, sent: float, first: float | None, last: float | None, count: int | None
) -> dict[str, Any]:
    timings = {"targeted_start": targeted, "request_start": sent, "resolve_end": None}
    return {
        "type_": "generative_request_stats",
        "request_args": json.dumps({"method": None, "body": {"max_tokens": wanted, "prompt": " red"}}),
        "info": {
            "status": "completed",
            "timings": {**timings, "first_token_iteration": first, "last_token_iteration": last},
            "error": None,
        },
        "prompt_tokens": 5,
        "cached_tokens": 2,
        "output_tokens": count,
    }


def report(successful: list[dict[str, Any]], errored: list[dict[str, Any]], strategy: str = "poisson") -> str:
    said = {"successful": {"mean": 1.0, "percentiles": {"p50": 20.5, "p95": 29.0, "p99": 30.5}}}
    benchmark = {
        "config": {"strategy": {"type_": strategy}},
        "requests": {"successful": successful, "errored": errored, "incomplete": [], "total": None},
        "metrics": {"time_to_first_token_ms": said, "inter_token_latency_ms": {"successful": None}},
    }
    return json.dumps({"metadata": {"guidellm_version": "0.8.1"}, "benchmarks": [benchmark]})


GOOD = [request(4, 100.5, 100.625, 100.75, 101.5, 4), request(2, 100.0, 100.0, 100.25, 100.5, 2)]


def test_times_count_from_when_a_request_was_due() -> None:
    failed = request(3, 101.0, 101.0, None, None, None)
    failed["info"]["error"] = "429 Too Many Requests"
    samples, said = read(report(GOOD, [failed]))
    assert said == {"TTFT p50": 20.5, "TTFT p99": 30.5}
    assert [sample.due_s for sample in samples] == [0.0, 0.5, 1.0]
    first, second, third = samples
    assert (first.token_s, first.sent_s, first.mean_gap) == ([0.25, 0.5], 0.0, 0.25)
    assert (second.token_s, second.sent_s, second.mean_gap) == ([0.25, 1.0], 0.125, 0.25)
    assert (second.count, second.num_wanted, second.num_prompt_tokens, second.hit_tokens) == (4, 4, 5, 2)
    assert [sample.complete for sample in samples] == [True, True, False]
    assert third.error == "429 Too Many Requests"
    summary = Summary.of("mode", 2.0, [samples], Slo(0.3, 0.3), driver="guidellm")
    assert (summary.num_good, summary.num_failed, summary.num_tokens, summary.elapsed) == (2, 1, 6, 1.5)
    assert (summary.gap_p99, summary.hit_tokens, summary.label) == (0.0, 4, "mode, guidellm")


def test_one_after_the_other_is_due_when_it_is_sent() -> None:
    """The schedule of such a run says when it began, for every request."""
    samples, _ = read(report([request(2, 100.0, 103.0, 103.5, 104.0, 2)], [], strategy="synchronous"))
    assert [(sample.sent_s, sample.token_s) for sample in samples] == [(0.0, [0.5, 1.0])]


@pytest.mark.parametrize("text", ["{", "{}", '{"benchmarks": []}', report([{"info": {}}], [])])
def test_another_report_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)cannot be read .*install guidellm==0\.8\.1"):
        read(text)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "guidellm"
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    return path


def drive(program: Path, workload: Workload, directory: Path) -> list[Sample]:
    directory.mkdir()
    samples, _ = asyncio.run(send(program, ENDPOINT, workload, directory))
    return samples


def test_every_prompt_is_sent_as_text_with_its_lengths(program: Path, tmp_path: Path) -> None:
    (tmp_path / "answer.json").write_text(report([*GOOD, GOOD[0]], []))
    assert len(drive(program, WORKLOAD, tmp_path / "run")) == 3
    rows = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    arrivals = WORKLOAD.arrivals()
    assert [row["prompt"] for row in rows] == ["".join(WORDS[token] for token in each.prompt) for each in arrivals]
    assert [row["prompt_tokens_count"] for row in rows] == [len(each.prompt) for each in arrivals]
    assert [row["output_tokens_count"] for row in rows] == [each.num_tokens for each in arrivals]
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["workers"] == "1"
    assert {"kind=poisson,rate=4", "kind=max_requests,count=3"} < set(told["words"])
    (backend,) = (word for word in told["words"] if "target=" in word)
    assert "target=http://127.0.0.1:1,model=tiny," in backend and backend.endswith("request_format=/v1/completions")


def test_what_goes_wrong_is_said(program: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit status 3; its last words:\na word of its log"):
        drive(program, WORKLOAD, tmp_path / "fails")
    (tmp_path / "answer.json").write_text(report(GOOD, []))
    with pytest.raises(RuntimeError, match="reports 2 requests of 3"):
        drive(program, WORKLOAD, tmp_path / "incomplete")


def test_a_complete_environment_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "sluice-pins").write_text("a==1\nb==2\n")
    assert ensure(tmp_path, ("a==1", "b==2")) == tmp_path / "bin" / "guidellm"
    assert [path.name for path in tmp_path.iterdir()] == ["sluice-pins"]

"""The short form of `make chaos`: every kind of fault that needs no Ray, once, and the judge's word on it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.chaos.campaign import Campaign, has_two_hosts, run
from tests.chaos.judge import Judge
from tests.chaos.record import Report, read
from tests.chaos.what import NEEDS_TWO_HOSTS, What

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(240)]

QUICK = {"words.heartbeat_s": 0.1, "words.heartbeat_timeout_s": 0.8, "words.step_timeout_s": 1.5}


def test_nothing_is_lost_doubled_resampled_or_leaked(tmp_path: Path) -> None:
    path = tmp_path / "report.jsonl"
    report = Report(path)
    kinds = [what for what in What if has_two_hosts() or what not in NEEDS_TWO_HOSTS]
    campaign = Campaign(seed=11, num_faults=len(kinds), minutes=3, num_questions=24, settings=QUICK)
    try:
        asyncio.run(run(campaign, report, print))
    finally:
        report.close()
    verdict = Judge(at_least=1, judges_times=False).judge(read(path))
    assert not verdict.findings
    assert set(verdict.kinds) == set(kinds)
    counts = verdict.counts
    assert counts["faults"] == len(kinds) and counts["ok"] > 50 and counts["moved"] > 0 and counts["cancelled"] > 0
    assert counts["refused"] > 0, "the storm filled no queue"

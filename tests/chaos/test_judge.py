"""A judge that finds nothing is worth nothing: every tampering with a good report is found, by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.judge import Judge
from tests.chaos.record import (
    Asked,
    Death,
    End,
    Ended,
    Expected,
    Fault,
    Gone,
    Got,
    Healed,
    Notice,
    Record,
    Report,
    Rest,
    Run,
    UnreadableReport,
    read,
)
from tests.chaos.verdict import Times, Verdict, summary

TOKENS = (5, 6, 7, 8)


def rest(*, cleared: bool, **changes: int) -> Rest:
    counts = {"free": 10, "filling": 0, "ready": 0, "cached": 0, "quarantined": 0, "leases": 0, "num_requests": 0}
    told = {"at_s": 9.0, "worker": "decode-0", "cleared": cleared, "num_blocks": 10}
    return Rest.model_validate({**told, **counts, **changes})


def fault(number: int, what: str, at_s: float, victim: str = "decode-0", state: str = "mid-decode") -> Fault:
    return Fault(
        at_s=at_s, number=number, what=what, victims=(victim,), incarnations=(f"{victim}!",), pids=(1,), state=state,
        seen="", busy=0.5,
    )  # fmt: skip


def request(name: str, asked_s: float, *, ingress: str = "i!", outcome: str = "ok") -> list[Record]:
    return [
        Asked(at_s=asked_s, request=name, question=0, sample=0, ingress=ingress),
        Got(at_s=asked_s + 0.1, request=name, first_index=0, tokens=TOKENS[:2]),
        Got(at_s=asked_s + 1.0, request=name, first_index=2, tokens=TOKENS[2:]),
        Ended.model_validate(
            {"at_s": asked_s + 1.1, "request": name, "outcome": outcome, "workers": ("decode-0", "prefill-0")}
        ),
    ]


def good() -> list[Record]:
    """One request through a kill of its decode worker, one that ended with its ingress, and a storm."""
    return [
        Run(seed=1, commit="c", num_faults=3, heartbeat_timeout_s=1.5, step_timeout_s=5.0),
        Expected(question=0, sample=0, num_prompt_tokens=3, seeded=False, tokens=TOKENS),
        *request("a", 1.0),
        fault(1, "kill decode", 1.5),
        Notice(at_s=1.55, peer="decode-0!", by="i", reason="gone"),
        Healed(at_s=3.0, number=1),
        *request("b", 4.0, ingress="x!")[:2],
        fault(2, "kill ingress", 4.5, "x"),
        Notice(at_s=4.6, peer="x!", by="decode-0", reason="gone"),
        Healed(at_s=5.0, number=2),
        Asked(at_s=6.0, request="s", question=0, sample=0, ingress="i!", storm=True),
        fault(3, "queue-full storm", 6.0, "i"),
        Ended(at_s=6.1, request="s", outcome="refused", error="the queue is full"),
        Healed(at_s=6.2, number=3),
        rest(cleared=False, free=8, cached=2),
        rest(cleared=True),
        End(at_s=10.0, num_workers=1),
    ]


def judge(records: list[Record], **asked: int) -> Verdict:
    return Judge(**asked).judge(records)  # pyright: ignore[reportArgumentType]


def test_a_good_report_is_good() -> None:
    verdict = judge(good())
    assert verdict.good, verdict.findings
    counts = verdict.counts
    assert (counts["requests"], counts["ok"], counts["with their ingress"], counts["refused"]) == (3, 1, 1, 1)
    killed = verdict.kinds["kill decode"]
    assert (killed.num_touched, killed.num_faults, dict(killed.states)) == (1, 1, {"mid-decode": 1})
    assert killed.recovery is not None and killed.recovery.p50_s == pytest.approx(0.5)
    assert killed.notice is not None and killed.notice.worst_s == pytest.approx(0.05)
    assert killed.healed is not None and killed.healed.worst_s == pytest.approx(1.5)
    told = summary(verdict)
    assert told["findings"] == {} and told["commit"] == "c"


Tamper = Callable[[list[Record]], list[Record]]


def swap(index: int, **changes: object) -> Tamper:
    """The record at this index of `good`, otherwise."""

    def tamper(records: list[Record]) -> list[Record]:
        records[index] = records[index].model_copy(update=changes)
        return records

    return tamper


def without(kind: type[Record], number: int = 0) -> Tamper:
    def tamper(records: list[Record]) -> list[Record]:
        records.remove([record for record in records if isinstance(record, kind)][number])
        return records

    return tamper


def plus(*more: Record) -> Tamper:
    return lambda records: [*records[:-1], *more, records[-1]]


@pytest.mark.parametrize(
    ("sort", "tamper"),
    [
        ("wrong", swap(3, tokens=(5, 9))),
        ("wrong", swap(4, tokens=(8, 7))),
        ("doubled", swap(4, first_index=1)),
        ("doubled", swap(4, tokens=(7, 8, 9))),
        ("doubled", plus(Got(at_s=9.0, request="a", first_index=4, tokens=(9,)))),
        ("left out", swap(4, first_index=3)),
        ("left out", without(Got, 1)),
        ("wrong", swap(10, tokens=(9,))),  # of the request whose ingress was killed
        ("lost", without(Ended)),
        ("lost", swap(5, outcome="failed", error="WorkerFailed")),
        ("lost", swap(5, outcome="cancelled")),
        ("lost", swap(5, outcome="refused")),
        ("lost", swap(9, ingress="i!")),
        ("unknown", swap(2, question=7)),
        ("unasked", plus(Got(at_s=9.0, request="nobody", first_index=0, tokens=(5,)))),
        ("leaked", swap(-3, leases=1)),
        ("leaked", swap(-3, quarantined=1, cached=1)),
        ("leaked", swap(-3, cached=1)),
        ("leaked", swap(-2, free=9, cached=1)),
        ("leaked", without(Rest, 1)),
        ("leaked", swap(-2, at_s=5.0)),  # before the last fault
        ("died", plus(Death(at_s=8.0, name="prefill-0", exit_code=-11))),
        ("not healed", without(Healed)),
        ("unnoticed", without(Notice)),
        ("slow", swap(7, at_s=2.2)),
        ("slow", swap(6, state="idle", at_s=1.3)),
        ("cut off", without(End)),
        ("cut off", without(Run)),
    ],
)
def test_tampering_is_found(sort: str, tamper: Tamper) -> None:
    verdict = judge(tamper(good()))
    assert list(verdict.findings) == [sort], verdict.findings


def test_a_late_notice_says_how_long_the_killed_process_lived_on() -> None:
    verdict = judge(plus(Gone(at_s=2.15, pid=1), Gone(at_s=9.0, pid=1))(swap(7, at_s=2.2)(good())))
    assert verdict.findings == {
        "slow": [
            "kill decode loaded: noticed after 0.700 s, the bound is 0.5 s; the kernel took 0.650 s at worst to end one"
        ]
    }
    gone = verdict.kinds["kill decode"].gone
    assert gone is not None and (gone.count, round(gone.worst_s, 3)) == (1, 0.65)


def test_a_refusal_is_fair_while_a_storm_lasts_only() -> None:
    refused = request("c", 6.05)[0], Ended(at_s=6.08, request="c", outcome="refused")
    assert judge(plus(*refused)(good())).good
    late = request("c", 8.0)[0], Ended(at_s=8.1, request="c", outcome="refused")
    assert list(judge(plus(*late)(good())).findings) == ["lost"]


def test_a_cancel_that_was_asked_for_may_stop_anywhere() -> None:
    records = plus(*request("c", 7.0, outcome="cancelled"))(good())
    index = next(i for i, record in enumerate(records) if isinstance(record, Asked) and record.request == "c")
    assert list(judge(records).findings) == ["lost"]
    assert judge(swap(index, cancel_after=2)(records)).good


def test_too_few_faults_or_states_are_found() -> None:
    verdict = judge(good(), at_least=2, num_states=2)
    assert len(verdict.findings["too few"]) == 3 + 2, "a storm has no states"


def test_a_silent_end_is_judged_by_its_own_bounds() -> None:
    frozen = swap(6, what="freeze decode, longer than heartbeats")
    assert judge(swap(7, at_s=3.0)(frozen(good()))).good
    hung = swap(6, what="hang decode")
    assert judge(swap(7, at_s=3.0)(hung(good()))).good
    for kind, noticed_s in ((frozen, 3.6), (hung, 8.0)):
        late = swap(7, at_s=noticed_s)(kind(good()))
        assert list(judge(late).findings) == ["unnoticed"], "it was healed by then"
        assert list(judge(swap(8, at_s=20.0)(late)).findings) == ["slow"]


def test_percentiles_are_of_the_nearest_rank() -> None:
    times = Times.of([float(number) for number in range(100, 0, -1)])
    assert times is not None and (times.p50_s, times.p99_s, times.worst_s) == (50.0, 99.0, 100.0)
    assert Times.of([]) is None


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "report.jsonl"
    report = Report(path)
    for record in good():
        report.add(record)
    report.close()
    assert list(read(path)) == good()
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UnreadableReport, match=r"report.jsonl:\d+: "):
        list(read(path))

"""When a worker tells its load: at once where it changed, now and then where it did not."""

from __future__ import annotations

from cluster.protos import worker_pb2 as pb
from workers.report import REPEAT_S, REPORT_S, LastReport


def test_what_is_the_same_is_told_now_and_then() -> None:
    last = LastReport()
    told: list[tuple[float, int]] = []

    def look(now: float, num_running: int) -> None:
        report = pb.LoadReport(num_running=num_running)
        if last.is_due(now) and last.is_news(report, now):
            told.append((now, num_running))

    num_looks = round(2 * REPEAT_S / REPORT_S)
    for look_number in range(1, num_looks + 1):
        look(look_number * REPORT_S * 1.001, 1)
    assert len(told) == 2 and told[1][0] - told[0][0] >= REPEAT_S
    now = (num_looks + 1) * REPORT_S * 1.001
    look(now, 2)
    look(now + REPORT_S / 2, 3)  # not due
    look(now + REPORT_S * 1.001, 3)
    assert [count for _, count in told[2:]] == [2, 3]


def test_whoever_joins_hears_at_once() -> None:
    last = LastReport()
    report = pb.LoadReport(num_running=1)
    assert last.is_news(report, 1.0) and not last.is_news(report, 1.0 + REPORT_S)
    last.forget()
    assert last.is_due(1.0 + REPORT_S) and last.is_news(report, 1.0 + REPORT_S)

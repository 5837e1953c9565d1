"""What the judge of a chaos run says: counts, times by kind of fault, and what must not be."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.chaos.record import Run

SHOWN = 10  # findings of a sort


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    count: int
    p50_s: float
    p99_s: float
    worst_s: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Times | None:
        every = sorted(seconds)
        if not every:
            return None
        return cls(count=len(every), p50_s=_percentile(every, 0.5), p99_s=_percentile(every, 0.99), worst_s=every[-1])

    def rounded(self) -> dict[str, float]:
        ms = {name: round(1e3 * getattr(self, f"{name}_s"), 1) for name in ("p50", "p99", "worst")}
        return {"count": self.count, **{f"{name}_ms": value for name, value in ms.items()}}


@dataclass(slots=True)
class Kind:
    """All faults of one kind."""

    num_faults: int = 0
    states: Counter[str] = field(default_factory=Counter)
    num_touched: int = 0  # requests that were open, at the victim
    num_unnoticed: int = 0
    notice: Times | None = None
    gone: Times | None = None  # of killed processes: from the signal until the kernel had ended them
    recovery: Times | None = None  # from the fault to the next token of a request at the victim
    healed: Times | None = None


@dataclass(slots=True)
class Verdict:
    """`findings`: what must not be, by sort; the run is good if there is none."""

    counts: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, Kind] = field(default_factory=dict)
    findings: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    run: Run | None = None
    elapsed_s: float = 0.0
    busy: float = 0.0

    def found(self, sort: str, told: str) -> None:
        self.findings[sort].append(told)

    @property
    def good(self) -> bool:
        return not self.findings


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank."""
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * round(1000 * share) // 1000) - 1))]


def summary(verdict: Verdict) -> dict[str, object]:
    """For people and docs: what was done, what was found, how fast."""
    run = verdict.run
    return {
        "commit": run.commit if run else "",
        "seed": run.seed if run else 0,
        "elapsed_s": round(verdict.elapsed_s),
        "busy_cores_share": round(verdict.busy, 2),
        "left_out": dict(run.left_out) if run else {},
        "counts": dict(sorted(verdict.counts.items())),
        "findings": {sort: len(told) for sort, told in sorted(verdict.findings.items())},
        "kinds": {what: _kind_summary(kind) for what, kind in verdict.kinds.items()},
    }


def _kind_summary(kind: Kind) -> dict[str, object]:
    times: Mapping[str, Times | None] = {
        "gone": kind.gone,
        "notice": kind.notice,
        "recovery": kind.recovery,
        "healed": kind.healed,
    }
    return {
        "faults": kind.num_faults,
        "states": dict(sorted(kind.states.items())),
        "requests_touched": kind.num_touched,
        **{name: each.rounded() for name, each in times.items() if each is not None},
    }


def show(verdict: Verdict) -> None:
    for sort, every in verdict.findings.items():
        for told in every[:SHOWN]:
            print(f"{sort}: {told}")
        if len(every) > SHOWN:
            print(f"{sort}: and {len(every) - SHOWN} more")
    print(", ".join(f"{count} {name}" for name, count in sorted(verdict.counts.items())))
    for what, kind in verdict.kinds.items():
        times = (
            ("gone", kind.gone),
            ("noticed", kind.notice),
            ("next token", kind.recovery),
            ("healed", kind.healed),
        )
        told = [f"{n} {1e3 * t.p50_s:.0f} / {1e3 * t.p99_s:.0f} ms" for n, t in times if t is not None]
        states = ", ".join(f"{state} {count}" for state, count in sorted(kind.states.items()))
        print(
            f"{kind.num_faults:4} {what} ({states}): {kind.num_touched} requests touched; {'; '.join(told)} (p50 / p99)"
        )
    print("good" if verdict.good else f"NOT good: {sum(map(len, verdict.findings.values()))} findings")

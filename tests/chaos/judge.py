"""Judges the report of a chaos run. It was not there: what it says follows from the lines alone.

    python -m tests.chaos.judge REPORT … [--at-least 15] [--states 3] [--times judge|tell] [--json FILE]

Nothing may be lost, doubled, resampled or wrong, whatever died; nothing may be held when nobody asks; nobody may die
of something else. `--at-least` asks for so many faults of each kind that kills, freezes or cuts, in `--states`
different states. `--times tell` says how fast faults were noticed without judging it: for machines that have other
things to do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
    Rest,
    Run,
    UnreadableReport,
    read,
)
from tests.chaos.verdict import Kind, Times, Verdict, show, summary

KILLED_IDLE_S, KILLED_LOADED_S, SILENT_S, ADOPTED_S = (
    0.1,
    0.5,
    2.0,
    10.0,
)  # the design's; p99 for the killed, the worst for the silent
CONTROLLER = "kill controller"
STEP_GRACE_S = 1.0  # from the step timeout to the heartbeat that tells of it, and its reader


@dataclass(slots=True)
class Told:
    """One request, put together from its lines."""

    asked: Asked
    got: list[Got] = field(default_factory=list)
    ended: Ended | None = None


class Judge:
    """Reads all records, then says what it thinks."""

    def __init__(self, *, at_least: int = 0, num_states: int = 1, judges_times: bool = True) -> None:
        self._at_least = at_least
        self._num_states = num_states
        self._judges_times = judges_times
        self._runs: list[Run] = []
        self._ends: list[End] = []
        self._expected: dict[tuple[int, int], tuple[int, ...]] = {}
        self._requests: dict[str, Told] = {}
        self._faults: dict[int, Fault] = {}
        self._healed: dict[int, Healed] = {}
        self._notices: list[Notice] = []
        self._rests: list[Rest] = []
        self._deaths: list[Death] = []
        self._gone: list[Gone] = []
        self._verdict = Verdict()

    def judge(self, records: Iterable[Record]) -> Verdict:
        for record in records:
            self._hear(record)
        verdict = self._verdict
        if len(self._runs) != 1 or len(self._ends) != 1:
            verdict.found("cut off", f"{len(self._runs)} first lines, {len(self._ends)} last lines")
            return verdict
        verdict.run, verdict.elapsed_s = self._runs[0], self._ends[0].at_s
        for death in self._deaths:
            verdict.found("died", f"{death.name} ended with {death.exit_code} at {death.at_s:.2f} s; nobody killed it")
        self._judge_requests()
        self._judge_rest()
        self._judge_faults()
        return verdict

    # ------------------------------------------------------------ hearing

    def _hear(self, record: Record) -> None:
        match record:
            case Run():
                self._runs.append(record)
            case End():
                self._ends.append(record)
            case Expected():
                self._expected[record.question, record.sample] = record.tokens
            case Asked():
                self._requests[record.request] = Told(record)
            case Got() | Ended():
                self._of_request(record)
            case Fault():
                self._faults[record.number] = record
            case Healed():
                self._healed[record.number] = record
            case Notice():
                self._notices.append(record)
            case Rest():
                self._rests.append(record)
            case Death():
                self._deaths.append(record)
            case Gone():
                self._gone.append(record)

    def _of_request(self, record: Got | Ended) -> None:
        told = self._requests.get(record.request)
        if told is None:
            self._verdict.found("unasked", f"{record.request} was told of and never asked")
        elif told.ended is not None:
            self._verdict.found("doubled", f"{record.request}: a {record.kind} line after its end")
        elif isinstance(record, Got):
            told.got.append(record)
        else:
            told.ended = record

    # ------------------------------------------------------------ requests

    def _judge_requests(self) -> None:
        verdict = self._verdict
        killed = {
            incarnation: fault.at_s
            for fault in self._faults.values()
            if fault.what == "kill ingress"
            for incarnation in fault.incarnations
        }
        storms = [t for t in self._requests.values() if t.asked.storm]
        for told in self._requests.values():
            verdict.counts["requests"] += 1
            self._judge_tokens(told)
            ended = told.ended
            if ended is None:
                if told.asked.ingress in killed:
                    verdict.counts["with their ingress"] += 1
                else:
                    verdict.found("lost", f"{told.asked.request}, asked at {told.asked.at_s:.2f} s, never ended")
                continue
            verdict.counts[ended.outcome] += 1
            verdict.counts["moved"] += ended.outcome == "ok" and ended.num_attempts > 1
            if ended.outcome == "failed":
                verdict.found("lost", f"{ended.request}, at {ended.at_s:.2f} s: {ended.error}")
            elif ended.outcome == "cancelled" and told.asked.cancel_after is None:
                verdict.found("lost", f"{ended.request} was cancelled, and its client did not ask for that")
            elif ended.outcome == "refused" and not _in_storm(told, ended, storms):
                verdict.found(
                    "lost", f"{ended.request} was refused at {ended.at_s:.2f} s without a storm: {ended.error}"
                )

    def _judge_tokens(self, told: Told) -> None:
        """Each index once, in order, and the right one."""
        verdict, asked = self._verdict, told.asked
        expected = self._expected.get((asked.question, asked.sample))
        if expected is None:
            verdict.found("unknown", f"{asked.request} asks question {asked.question}, which has no answer")
            return
        tokens: list[int] = []
        for got in told.got:
            if got.first_index < len(tokens):
                verdict.found("doubled", f"{asked.request}: index {got.first_index} again, {len(tokens)} were there")
                return
            if got.first_index > len(tokens):
                verdict.found("left out", f"{asked.request}: index {got.first_index}, when {len(tokens)} were there")
                return
            tokens += got.tokens
        verdict.counts["tokens"] += len(tokens)
        for index, (token, right) in enumerate(zip(tokens, expected, strict=False)):
            if token != right:
                verdict.found("wrong", f"{asked.request}: token {index} is {token}, and not {right}")
                return
        if len(tokens) > len(expected):
            verdict.found("doubled", f"{asked.request}: {len(tokens)} tokens, {len(expected)} were to come")
        elif told.ended is not None and told.ended.outcome == "ok" and len(tokens) < len(expected):
            verdict.found("left out", f"{asked.request}: {len(tokens)} tokens of {len(expected)}")

    # ------------------------------------------------------------ rest

    def _judge_rest(self) -> None:
        verdict = self._verdict
        last: dict[tuple[str, bool], Rest] = {}
        for rest in self._rests:
            last[rest.worker, rest.cleared] = rest
            where = f"{rest.worker} at {rest.at_s:.2f} s"
            held = {name: getattr(rest, name) for name in ("filling", "ready", "quarantined", "leases", "num_requests")}
            if any(held.values()):
                verdict.found("leaked", f"{where}: " + ", ".join(f"{n} {name}" for name, n in held.items() if n))
            if rest.free + rest.filling + rest.ready + rest.cached + rest.quarantined != rest.num_blocks:
                verdict.found("leaked", f"{where}: the states do not add up to {rest.num_blocks} blocks: {rest}")
            elif rest.cleared and rest.free != rest.num_blocks:
                verdict.found("leaked", f"{where}: {rest.num_blocks - rest.free} blocks are not free after a clear")
        verdict.counts["rests"] = sum(not rest.cleared for rest in self._rests)
        final = {worker for (worker, cleared), rest in last.items() if cleared and rest.at_s > self._last_fault_s()}
        if len(final) != self._ends[0].num_workers:
            verdict.found("leaked", f"{len(final)} of {self._ends[0].num_workers} workers were seen at rest at the end")

    def _last_fault_s(self) -> float:
        return max((fault.at_s for fault in self._faults.values()), default=0.0)

    # ------------------------------------------------------------ faults

    def _judge_faults(self) -> None:
        verdict = self._verdict
        by_kind: dict[str, list[Fault]] = defaultdict(list)
        for fault in self._faults.values():
            by_kind[fault.what].append(fault)
            if fault.number not in self._healed:
                verdict.found("not healed", f"fault {fault.number}, {fault.what}")
        verdict.counts["faults"] = len(self._faults)
        verdict.busy = sum(fault.busy for fault in self._faults.values()) / max(1, len(self._faults))
        for what, faults in sorted(by_kind.items()):
            verdict.kinds[what] = self._kind(what, faults)
            self._judge_coverage(what, verdict.kinds[what])

    def _judge_coverage(self, what: str, kind: Kind) -> None:
        num_states = len([state for state in kind.states if state != "any"])
        if kind.num_faults < self._at_least:
            self._verdict.found("too few", f"{what}: {kind.num_faults} of {self._at_least}")
        if num_states < self._num_states and what != "queue-full storm":
            self._verdict.found("too few", f"{what}: in {num_states} states, {self._num_states} are wanted")

    def _kind(self, what: str, faults: Sequence[Fault]) -> Kind:
        kind = Kind(num_faults=len(faults), states=Counter(fault.state for fault in faults))
        recovered: list[float] = []
        idle: list[float] = []
        loaded: list[float] = []
        for fault in faults:
            touched = [told for told in self._requests.values() if _touches(fault, told)]
            kind.num_touched += len(touched)
            recovered += [after for told in touched if (after := _next_token_s(fault, told)) is not None]
            noticed = self._noticed(fault)
            (idle if fault.state == "idle" else loaded).extend(noticed)
            if not noticed and _must_be_noticed(what):
                kind.num_unnoticed += 1
                self._verdict.found("unnoticed", f"fault {fault.number}, {what} at {fault.at_s:.2f} s")
        kind.notice = Times.of(idle + loaded)
        kind.gone = Times.of(after for fault in faults if (after := self._gone_s(fault)) is not None)
        kind.recovery = Times.of(recovered)
        kind.healed = Times.of(
            self._healed[fault.number].at_s - fault.at_s for fault in faults if fault.number in self._healed
        )
        if self._judges_times:
            self._judge_notice(what, idle, loaded, kind.gone)
            if what == CONTROLLER and kind.healed is not None and kind.healed.worst_s > ADOPTED_S:
                self._verdict.found("slow", f"{what}: adopted again after {kind.healed.worst_s:.1f} s")
        return kind

    def _noticed(self, fault: Fault) -> list[float]:
        """Seconds until each survivor acted."""
        healed = self._healed.get(fault.number)
        until = healed.at_s if healed else float("inf")
        first: dict[tuple[str, str], float] = {}
        for notice in self._notices:
            survives = notice.peer in fault.incarnations and notice.by not in fault.victims
            if survives and fault.at_s <= notice.at_s <= until:
                first.setdefault((notice.peer, notice.by), notice.at_s - fault.at_s)
        return list(first.values())

    def _gone_s(self, fault: Fault) -> float | None:
        """How long the kernel took to end what was killed."""
        if not fault.what.startswith("kill"):
            return None
        gone = (each.at_s - fault.at_s for each in self._gone if each.pid in fault.pids and each.at_s >= fault.at_s)
        return min(gone, default=None)

    def _judge_notice(self, what: str, idle: Sequence[float], loaded: Sequence[float], gone: Times | None) -> None:
        run = self._runs[0]
        if what.startswith("kill"):
            bounds = (("idle", idle, KILLED_IDLE_S), ("loaded", loaded, KILLED_LOADED_S))
        elif what.startswith("hang"):
            bounds = (("", [*idle, *loaded], run.step_timeout_s + STEP_GRACE_S),)
        elif "longer" in what:
            bounds = (("", [*idle, *loaded], SILENT_S),)
        else:
            return
        for how, seconds, bound_s in bounds:
            times = Times.of(seconds)
            if times is None:
                continue
            value = times.p99_s if what.startswith("kill") else times.worst_s
            if value > bound_s:
                kernel = "" if gone is None else f"; the kernel took {gone.worst_s:.3f} s at worst to end one"
                self._verdict.found(
                    "slow", f"{what} {how}: noticed after {value:.3f} s, the bound is {bound_s:g} s{kernel}"
                )


def _must_be_noticed(what: str) -> bool:
    """Nobody has a session to the controller: Ray restarts it."""
    return what != CONTROLLER and (what.startswith(("kill", "hang")) or "longer" in what)


def _in_storm(told: Told, ended: Ended, storms: Sequence[Told]) -> bool:
    return told.asked.storm or any(
        storm.asked.at_s <= ended.at_s and (storm.ended is None or storm.ended.at_s >= told.asked.at_s)
        for storm in storms
    )


def _touches(fault: Fault, told: Told) -> bool:
    """Whether the request was open when its ingress, or a worker planned for it, was struck."""
    if told.asked.at_s > fault.at_s or (told.ended is not None and told.ended.at_s < fault.at_s):
        return False
    workers = () if told.ended is None else told.ended.workers
    return told.asked.ingress in fault.incarnations or not set(workers).isdisjoint(fault.victims)


def _next_token_s(fault: Fault, told: Told) -> float | None:
    return next((got.at_s - fault.at_s for got in told.got if got.at_s >= fault.at_s), None)


def tell(reports: Sequence[Path], *, at_least: int, num_states: int, times: str, json_path: Path | None) -> int:
    """Judges and prints; an exit status."""
    verdicts: list[Verdict] = []
    for report in reports:
        judge = Judge(at_least=at_least, num_states=num_states, judges_times=times == "judge")
        try:
            verdicts.append(judge.judge(read(report)))
        except UnreadableReport as error:
            print(error)
            return 2
        show(verdicts[-1])
    if json_path is not None:
        json_path.write_text(json.dumps({"runs": [summary(verdict) for verdict in verdicts]}, indent=2) + "\n")
    return 0 if all(verdict.good for verdict in verdicts) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.judge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT")
    parser.add_argument("--at-least", type=int, default=0, help="faults of each kind")
    parser.add_argument("--states", type=int, default=1, help="in so many states each")
    parser.add_argument("--times", choices=("judge", "tell"), default="judge")
    parser.add_argument("--json", type=Path, help="write the summaries here, too")
    options = parser.parse_args()
    return tell(
        options.reports,
        at_least=options.at_least,
        num_states=options.states,
        times=options.times,
        json_path=options.json,
    )


if __name__ == "__main__":
    sys.exit(main())

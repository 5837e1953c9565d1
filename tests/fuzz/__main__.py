"""The long run: an app of its own, all kinds of cases at once, schemathesis from our OpenAPI document, a census.

    python -m tests.fuzz [--cases 10000] [--seed 0] [--rounds 4] [--report docs/fuzz.json]
                         [--no-schemathesis] [--only KIND …]

Takes about 15 minutes on two cores. schemathesis, installed into .cache first, adds its own cases. Each round is
followed by a census: processes, sessions, leases and blocks must be as before, and nobody may grow round by round.
The exit status is 1 if anything failed; what failed is printed whole, and the same seed makes the same cases again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.fuzz.campaign import Campaign, Kind, oracle_of, run
from tests.fuzz.census import Census
from tests.fuzz.document import Document, SchemaRun, ensure
from tests.support.public_door import PublicDoor, public_door

ROOT = Path(__file__).parents[2]
NUM_PROCESSES = 5  # controller, two replicas, prefill and decode worker
MAX_GROWTH_BYTES = 256 << 20  # from the first census to the last: caches fill, pools are made
MAX_LATE_GROWTH_BYTES = 48 << 20  # over the last round
SHOWN = 5  # failures of a kind

PER_CENT: Mapping[str, int] = MappingProxyType(
    {
        "completion": 13,
        "chat": 12,
        "form": 3,
        "embedding": 6,
        "tokens": 5,
        "repeat": 5,
        "mutant": 16,
        "writing": 10,
        "json": 6,
        "bytes": 4,
        "http": 5,
        "header": 5,
        "crumbs": 3,
        "vanish": 7,
    }
)


@dataclass
class Outcomes:
    """Of all rounds, by kind."""

    num_cases: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    failures: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    num_failed: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    slowest_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def failed(self, kind: str, told: str) -> None:
        self.num_failed[kind] += 1
        if len(self.failures[kind]) < SHOWN:
            self.failures[kind].append(told)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="of all kinds together, beside schemathesis's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--report", type=Path, help="where the counts go, as JSON")
    parser.add_argument("--only", nargs="+", choices=sorted(PER_CENT), default=sorted(PER_CENT), metavar="KIND")
    parser.add_argument("--no-schemathesis", action="store_true")
    chosen = parser.parse_args()
    console = Console(stderr=True)
    schemathesis = None if chosen.no_schemathesis else ensure(ROOT)
    with tempfile.TemporaryDirectory() as cache, public_door(Path(cache)) as door:
        return _fuzz(console, door, chosen, schemathesis)


def _fuzz(console: Console, door: PublicDoor, chosen: argparse.Namespace, schemathesis: Path | None) -> int:
    campaign = Campaign(door.url, oracle_of(door.tokenizer, json.loads((door.checkpoint / "config.json").read_text())))
    kinds = campaign.kinds()
    outcomes = Outcomes()
    censuses = [Census.take(door.url, NUM_PROCESSES)]
    started_at = time.monotonic()
    for number in range(chosen.rounds):
        shares = {name: max(1, chosen.cases * PER_CENT[name] // (100 * chosen.rounds)) for name in chosen.only}
        _round(console, f"round {number + 1}", kinds, shares, chosen.seed + number, outcomes)
        censuses.append(Census.take(door.url, NUM_PROCESSES))
    schema_runs: list[SchemaRun] = []
    if schemathesis is not None:
        document = Document(door.url, schemathesis, vocab_size=campaign.oracle.vocab_size)
        for mode in ("positive", "negative"):
            console.print(f"schemathesis, {mode} data …")
            schema_runs.append(document.run(mode, max(1, chosen.cases // 40), chosen.seed))
        censuses.append(Census.take(door.url, NUM_PROCESSES))
    wrong = _left_behind(censuses)
    report = _report(chosen, campaign, outcomes, censuses, schema_runs, time.monotonic() - started_at)
    _show(console, outcomes, schema_runs, report, wrong)
    if chosen.report is not None:
        chosen.report.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if wrong or outcomes.failures or any(each.failures for each in schema_runs) else 0


def _round(
    console: Console, title: str, kinds: Mapping[str, Kind], shares: Mapping[str, int], seed: int, outcomes: Outcomes
) -> None:
    """All kinds at once, each over its own connections."""
    with Progress(
        TextColumn("{task.description:>24}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        tasks = {name: progress.add_task(f"{title}: {name}", total=share) for name, share in shares.items()}

        def work(name: str) -> None:
            kind = kinds[name]

            def check(case: Any) -> None:
                started_at = time.monotonic()
                try:
                    kind.check(case)
                finally:
                    progress.advance(tasks[name])
                    outcomes.num_cases[name] += 1
                    outcomes.slowest_s[name] = max(outcomes.slowest_s[name], time.monotonic() - started_at)

            def failed(case: Any, error: Exception) -> None:
                outcomes.failed(name, f"{type(error).__name__}: {str(error)[:2000]}\n  in {str(case)[:4000]}")

            try:
                run(Kind(kind.cases, check), shares[name], seed, failed)
            except Exception as error:  # noqa: BLE001 - hypothesis itself gave up: that is told, the others go on
                outcomes.failed(name, f"no more cases: {error!r}")

        threads = [threading.Thread(target=work, args=(name,)) for name in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if not console.is_terminal:
        console.print(f"{title}: {sum(outcomes.num_cases.values())} cases, {sum(outcomes.num_failed.values())} failed")


def _left_behind(censuses: Sequence[Census]) -> list[str]:
    """What differs from before, in words."""
    wrong: list[str] = []
    pairs = [(censuses[0], MAX_GROWTH_BYTES)]
    if len(censuses) > 3:
        pairs.append((censuses[-2], MAX_LATE_GROWTH_BYTES))
    for before, most in pairs:
        try:
            censuses[-1].check(before, most)
        except AssertionError as error:
            wrong.append(str(error))
    return wrong


def _report(
    chosen: argparse.Namespace,
    campaign: Campaign,
    outcomes: Outcomes,
    censuses: Sequence[Census],
    schema_runs: Sequence[SchemaRun],
    elapsed_s: float,
) -> dict[str, Any]:
    names = sorted(censuses[0].rss_bytes)
    ingresses = [name for name in names if name.startswith("ingress")]  # their names are new in each run
    labels = {f"ingress-{ingresses.index(name)}" if name in ingresses else name: name for name in names}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "seed": chosen.seed,
        "rounds": chosen.rounds,
        "elapsed_s": round(elapsed_s),
        "cases": sum(outcomes.num_cases.values()) + sum(each.num_cases for each in schema_runs),
        "kinds": {
            name: {
                "cases": outcomes.num_cases[name],
                "failed": outcomes.num_failed.get(name, 0),
                "slowest_s": round(outcomes.slowest_s[name], 2),
            }
            for name in sorted(outcomes.num_cases)
        },
        "answers_by_status": {
            "none, the client left" if status == 0 else str(status): number
            for status, number in sorted(campaign.statuses.items())
        },
        "schemathesis": {
            each.mode: {"cases": each.num_cases, "failed": len(each.failures), "answers_by_status": each.statuses}
            for each in schema_runs
        },
        "rss_mib_by_census": {
            label: [census.rss_bytes[name] >> 20 for census in censuses] for label, name in labels.items()
        },
        "open_files_by_census": {
            label: [census.num_files[name] for census in censuses] for label, name in labels.items()
        },
    }


def _show(
    console: Console,
    outcomes: Outcomes,
    schema_runs: Sequence[SchemaRun],
    report: Mapping[str, Any],
    wrong: Sequence[str],
) -> None:
    for name, told in outcomes.failures.items():
        for each in told:
            console.print(f"{name}: {each}", markup=False, highlight=False, soft_wrap=True)
    for each in schema_runs:
        for failure in each.failures:
            console.print(f"schemathesis {each.mode}: {failure}", markup=False, highlight=False, soft_wrap=True)
    table = Table("kind", "cases", "failed", "slowest")
    for name, told in report["kinds"].items():
        table.add_row(name, str(told["cases"]), str(told["failed"]), f"{told['slowest_s']:.1f} s")
    for each in schema_runs:
        table.add_row(f"schemathesis {each.mode}", str(each.num_cases), str(len(each.failures)), "")
    table.add_row("all", str(report["cases"]), str(sum(outcomes.num_failed.values())), f"{report['elapsed_s']} s")
    console.print(table)
    console.print("answers by status:", report["answers_by_status"])
    for mode, told in report["schemathesis"].items():
        console.print(f"of schemathesis, {mode}:", told["answers_by_status"])
    console.print("MiB at each census:", report["rss_mib_by_census"])
    console.print("open files at each census:", report["open_files_by_census"])
    for each in wrong:
        console.print(f"left behind: {each}", style="red", markup=False)


if __name__ == "__main__":
    sys.exit(main())

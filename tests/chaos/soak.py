"""Soak: steady load, a fifth of it cancelled, nothing is killed; nothing may grow, and every token is judged.

    python -m tests.chaos.soak [--minutes 30] [--report .cache/soak.jsonl] [--json docs/soak.json]
                               [--plot docs/images/soak.png]

Sampled each second, of every worker and ingress process: resident memory, open file handles, threads; of every worker:
sessions, and blocks that are neither free nor cached. The exit status is 1 if any of them grows more than its noise
explains and than is allowed (`ALLOWED`), or if the judge finds anything.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:  # the module itself is imported by every process of the cluster, so what is heavy waits
    from tests.chaos.arena import Arena
    from tests.chaos.record import Report

CANCELS = 0.2
SAMPLE_S = 1.0
NUM_CLIENTS = 4  # of each of two ingresses
ALLOWED: Mapping[str, float] = MappingProxyType(
    {"resident MiB": 12.0, "file handles": 2.0, "threads": 1.0, "sessions": 0.5, "busy blocks": 24.0}
)

Samples = dict[tuple[str, str], list[tuple[float, float]]]  # (what, process) -> (seconds, value)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=Path(".cache/soak.jsonl"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    from tests.chaos.judge import Judge
    from tests.chaos.record import Report, read
    from tests.chaos.verdict import show

    options.report.parent.mkdir(parents=True, exist_ok=True)
    report = Report(options.report)
    try:
        samples = asyncio.run(_soak(report, options.seed, options.minutes))
    finally:
        report.close()
    verdict = Judge().judge(read(options.report))
    show(verdict)
    told, steep = _judge_growth(samples)
    for line in steep:
        print(f"grows: {line}")
    if options.json is not None:
        counts = dict(sorted(verdict.counts.items()))
        commit = verdict.run.commit if verdict.run else ""
        whole = {"commit": commit, "minutes": options.minutes, "cancels": CANCELS, "counts": counts, "growth": told}
        options.json.write_text(json.dumps(whole, indent=2) + "\n")
    if options.plot is not None:
        _plot(samples, options.plot, f"{options.minutes:g} minutes, {verdict.counts['requests']} requests")
    print("flat" if not steep else "NOT flat")
    return 0 if verdict.good and not steep else 1


async def _soak(report: Report, seed: int, minutes: float) -> Samples:
    from tests.chaos.answers import answered
    from tests.chaos.arena import arena
    from tests.chaos.campaign import commit, write_expected
    from tests.chaos.record import End, Run

    asked = answered(96, seed)
    questions = [answer.question for answer in asked]
    async with arena(report, questions, {}, num_crowds=2, two_hosts=False, cancels=CANCELS) as made:
        words = made.cluster.config.words
        report.add(
            Run(
                seed=seed,
                commit=commit(),
                num_faults=0,
                heartbeat_timeout_s=words.heartbeat_timeout_s,
                step_timeout_s=words.step_timeout_s,
            )
        )
        write_expected(report, asked)
        samples: Samples = defaultdict(list)
        processes = {name: psutil.Process(worker.process.pid) for name, worker in made.cluster.workers.items()}
        processes |= {name: psutil.Process(crowd.process.pid) for name, crowd in made.crowds.items()}
        made.pace(NUM_CLIENTS)
        began_at = time.monotonic()
        while (now := time.monotonic() - began_at) < 60 * minutes:
            await _sample(made, processes, samples, now)
            await asyncio.sleep(max(0.0, SAMPLE_S - (time.monotonic() - began_at - now)))
        made.note_deaths()
        made.pace(0)
        await made.rest()
        report.add(End(at_s=made.now(), num_workers=len(made.cluster.workers)))
    return samples


async def _sample(made: Arena, processes: Mapping[str, psutil.Process], samples: Samples, now: float) -> None:
    for name, process in processes.items():
        with process.oneshot():
            samples["resident MiB", name].append((now, process.memory_info().rss / 2**20))
            samples["file handles", name].append((now, process.num_fds()))
            samples["threads", name].append((now, process.num_threads()))
    names = {worker.member.incarnation: name for name, worker in made.cluster.workers.items() if worker.member}
    for incarnation, answer in (await made.cluster.router.load()).items():
        name = names[incarnation]
        busy = sum(g.filling + g.ready + g.quarantined for g in answer.load.groups)
        sessions = sum(v for key, v in answer.counters.items() if key.startswith("sluice_words_sessions"))
        samples["busy blocks", name].append((now, busy))
        samples["sessions", name].append((now, sessions))


def _judge_growth(samples: Samples) -> tuple[dict[str, dict[str, dict[str, float | bool]]], list[str]]:
    """Of each series, for people and JSON; those that are not flat, in words."""
    from tests.chaos.flatness import flatness

    told: dict[str, dict[str, dict[str, float | bool]]] = defaultdict(dict)
    steep: list[str] = []
    for (what, name), series in sorted(samples.items()):
        found = flatness([at for at, _ in series], [value for _, value in series], ALLOWED[what])
        numbers = {"first": found.first, "last": found.last, "growth": found.growth, "noise": found.noise}
        told[what][name] = {key: round(value, 2) for key, value in numbers.items()} | {"flat": found.flat}
        if not found.flat:
            steep.append(f"{what} of {name}: {found.first:.1f} to {found.last:.1f}, noise {found.noise:.2f}")
    return told, steep


def _plot(samples: Samples, path: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(ALLOWED), 1, figsize=(9, 11), sharex=True, layout="constrained")
    for what, axis in zip(ALLOWED, axes, strict=True):
        for (each, name), series in sorted(samples.items()):
            if each == what:
                axis.plot([at / 60 for at, _ in series], [value for _, value in series], label=name, linewidth=1)
        axis.set_ylabel(what)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(ncols=6, fontsize="small", loc="lower center")
    axes[0].set_title(title)
    axes[-1].set_xlabel("minutes")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())

"""All benchmarks, one after the other, and their figures in one file.

    python -m benchmarks [--only transfer router simulator words sessions engine speculation encdec encoder_output
                                 overhead serving serving-guidellm failures] [--quick] [--json docs/measurements.json]

Wants a machine that does nothing else, about 20 minutes, and `pip install -e .[test]` for the picture. --quick only
shows that everything runs: sizes so small that the figures mean nothing, and nothing is written unless asked for.
serving-guidellm installs guidellm into .cache first. What is not measured now keeps its figures in the file; a
benchmark that fails takes nothing from the others, and the exit status tells.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from benchmarks.report import ROOT, progress

OUT = ROOT / "docs" / "measurements.json"
Report = dict[str, object]  # as benchmarks.report.Report.tree makes it

QUIET = 0.5  # load average; above it the figures are somebody else's, too
QUICK: Mapping[str, str] = MappingProxyType(
    {
        "transfer": "--tokens 256 --layers 4 --repeats 1",
        "router": "--blocks 20000 --decisions 50",
        "simulator": "--span 6 --speeds 1",
        "words": "--round-trips 50 --steps 20 --sequences 8",
        "sessions": "--ingresses 2 --workers 4 --hosts 2 --seconds 1",
        "engine": "--only jitter --steps 10",
        "speculation": "--tokens 16 --repeats 1 --batch-sizes 2",
        "encdec": "--requests 4 --repeats 1 --batch-sizes 4",
        "encoder_output": "--requests 1 --tokens 64",
        "overhead": "--requests 3 --warmup 2",
        "serving": "--rates 4 --seconds 1 --rounds 1",
        "serving-guidellm": "--rates 4 --seconds 1 --rounds 1",
        "failures": "--kills 1 --silences 1",
    }
)
COMMANDS: Mapping[str, str] = MappingProxyType(  # others: the name
    {"serving-guidellm": "serving --driver guidellm", "simulator": "simulator compare"}
)


def run(name: str, directory: Path, *, quick: bool) -> Report:
    """One benchmark in a process of its own; what it reported. Raises CalledProcessError."""
    out = directory / f"{name}.json"
    module, *arguments = COMMANDS.get(name, name).split()
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--json", str(out)]
    if quick:
        command += QUICK[name].split()
        command += ["--plot", str(directory / f"{name}.png")] if module == "serving" else []
    progress(f"{name} …")
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads(out.read_text())


def run_all(names: Sequence[str], directory: Path, *, quick: bool) -> tuple[list[Report], list[str]]:
    """What those that ran reported, and the names of the others."""
    reports: list[Report] = []
    failed: list[str] = []
    for name in names:
        try:
            reports.append(run(name, directory, quick=quick))
        except subprocess.CalledProcessError as error:
            progress(f"{name} failed: {error}")
            failed.append(name)
    return reports, failed


def merged(before: Sequence[Report], now: Sequence[Report]) -> list[Report]:
    """Each benchmark once, the newer report; in the order of QUICK, those without a place there last."""
    by_name = {str(report["benchmark"]): report for report in (*before, *now)}
    order = [*(name for name in QUICK if name in by_name), *(name for name in by_name if name not in QUICK)]
    return [by_name[name] for name in order]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(QUICK), default=list(QUICK))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument(
        "--json", type=Path, help="where the figures go; default docs/measurements.json, not if --quick"
    )
    options = parser.parse_args()
    if (load := os.getloadavg()[0]) > QUIET:
        progress(f"the machine is not quiet (load {load:.1f}); wait until it is for figures that count")
    with tempfile.TemporaryDirectory() as name:
        reports, failed = run_all(options.only, Path(name), quick=options.quick)
    out = options.json or (None if options.quick else OUT)
    if out is not None:
        before = json.loads(out.read_text()) if out.is_file() else []
        out.write_text(json.dumps(merged(before, reports), indent=1, ensure_ascii=False) + "\n")
        progress(f"written: {out}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

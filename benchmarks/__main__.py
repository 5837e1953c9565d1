"""All benchmarks, one after the other, and their figures in one file.

    python -m benchmarks [--only transfer words engine overhead serving failures] [--quick] [--json FILE]

Wants a machine that does nothing else, about ten minutes, and `pip install -e .[test]` for the picture. --quick only
shows that everything runs: sizes so small that the figures mean nothing, and nothing is written unless asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from benchmarks.report import ROOT, progress

OUT = ROOT / "docs" / "measurements.json"
QUIET = 0.5  # load average; above it the figures are somebody else's, too
QUICK: Mapping[str, str] = MappingProxyType(
    {
        "transfer": "--tokens 256 --layers 4 --repeats 1",
        "words": "--round-trips 50 --steps 20 --sequences 8",
        "engine": "--only jitter --steps 10",
        "overhead": "--requests 3 --warmup 2",
        "serving": "--rates 4 --seconds 1 --rounds 1",
        "failures": "--kills 1 --silences 1",
    }
)


def run(name: str, directory: Path, *, quick: bool) -> dict[str, object]:
    """One benchmark in a process of its own; what it reported. Raises CalledProcessError."""
    out = directory / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(out)]
    if quick:
        command += QUICK[name].split()
        command += ["--plot", str(directory / "serving.png")] if name == "serving" else []
    progress(f"{name} …")
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads(out.read_text())


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
        reports = [run(one, Path(name), quick=options.quick) for one in options.only]
    out = options.json or (None if options.quick else OUT)
    if out is not None:
        out.write_text(json.dumps(reports, indent=1, ensure_ascii=False) + "\n")
        progress(f"written: {out}")


if __name__ == "__main__":
    main()

"""What every benchmark prints and writes: figures beside their bounds, with the machine, versions and commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "nixl", "grpcio", "ray", "uvicorn", "triton", "flashinfer-python", "sgl-deep-gemm")
_WIDTH = 175


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value. The bound is measured in the same run, or a target, which the note then says."""

    name: str
    value: float
    unit: str
    bound: float | None = None
    less_is_better: bool = False
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How much of the bound is reached: 1 is all of it, whichever direction is better."""
        if self.bound is None or not self.bound or not self.value:
            return None
        return self.bound / self.value if self.less_is_better else self.value / self.bound


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and with what the figures were measured."""

    cpu: str
    num_cpus: int
    memory_gb: float
    system: str
    python: str
    versions: Mapping[str, str]
    commit: str
    load: float  # of the machine over the last minute, when the run began: well under 1 is quiet
    date: str

    @classmethod
    def here(cls) -> Setting:
        return cls(
            cpu=_cpu(),
            num_cpus=os.cpu_count() or 1,
            memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
            system=f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
            python=platform.python_version(),
            versions={name: found for name in PACKAGES if (found := _version(name))},
            commit=_commit(),
            load=round(os.getloadavg()[0], 2),
            date=datetime.now(UTC).date().isoformat(),
        )

    @property
    def hardware(self) -> str:
        return f"{self.num_cpus} × {self.cpu}, {self.memory_gb:.0f} GB"

    @property
    def software(self) -> str:
        return ", ".join([f"Python {self.python}", *(f"{name} {found}" for name, found in self.versions.items())])


@dataclass(frozen=True, slots=True)
class Report:
    benchmark: str
    what: str  # was measured, in one line
    arguments: Mapping[str, object]
    figures: Sequence[Figure]
    setting: Setting
    details: Mapping[str, object] = field(default_factory=dict)

    def show(self) -> None:
        table = Table(title=f"{self.benchmark}: {self.what}", title_justify="left")
        for column in ("figure", "value", "unit", "bound", "of bound", "note"):
            table.add_column(column, justify="left" if column in ("figure", "unit", "note") else "right")
        for figure in self.figures:
            bound = "" if figure.bound is None else f"{figure.bound:.4g}"
            share = "" if figure.ratio is None else f"{figure.ratio:.2f}"
            table.add_row(figure.name, f"{figure.value:.4g}", figure.unit, bound, share, figure.note)
        screen = console()
        screen.print(table)
        sign(screen, self.setting)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.tree(), indent=2, ensure_ascii=False) + "\n")

    def tree(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "benchmark": self.benchmark,
            "what": self.what,
            "arguments": dict(self.arguments),
            "setting": asdict(self.setting),
            "figures": [{**asdict(figure), "ratio": figure.ratio} for figure in self.figures],
            "details": dict(self.details),
        }


def console() -> Console:
    """On a pipe as wide as a table needs."""
    screen = Console(highlight=False)
    screen.width = screen.width if screen.is_terminal else _WIDTH
    return screen


def sign(screen: Console, setting: Setting) -> None:
    screen.print(f"{setting.hardware}, {setting.system}, load {setting.load:g}; commit {setting.commit}")
    screen.print(f"{setting.software}\n")


def publish(report: Report, path: Path | None) -> None:
    report.show()
    if path is not None:
        report.write(path)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of `values` do not exceed. 0 when there is none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """With a + behind it when tracked files differ from it."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.stdout.strip()

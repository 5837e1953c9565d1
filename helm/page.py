"""A dashboard as one HTML page that holds all it needs: what was answered, and uPlot, which draws it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helm.panels import Dashboard, Panel
from helm.record import Line, Record
from helm.schema import Json

CACHE: Final = Path(__file__).parents[1] / ".cache" / "dashboards"
_TEMPLATE: Final = Path(__file__).with_name("dashboard.html")
_PACKAGE: Final = "uplot@1.6.32"
_INTEGRITY: Final = "sha512-KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw=="
_FETCH_S: Final = 120.0


class PageError(Exception):
    """What draws pages cannot be had, or a record is of other dashboards."""


@dataclass(frozen=True, slots=True)
class Plotter:
    """uPlot, as its package has it."""

    script: str
    style: str

    @classmethod
    def fetch(cls, cache: Path = CACHE) -> Plotter:
        """By npm, once, into `cache`. Raises PageError."""
        packed = cache / f"{_PACKAGE.replace('@', '-')}.tgz"
        if not packed.exists():
            cache.mkdir(parents=True, exist_ok=True)
            command = ["npm", "pack", _PACKAGE, "--silent", "--pack-destination", str(cache)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=_FETCH_S)
            except FileNotFoundError as error:
                raise PageError("npm is not installed: it fetches uPlot, which draws the pages") from error
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                raise PageError(f"{' '.join(command)}: {error.stderr or error}") from error
        content = packed.read_bytes()
        digest = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
        if digest != _INTEGRITY:
            raise PageError(f"{packed} is not {_PACKAGE}, its digest is {digest}: remove it")
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            script, style = (_text(archive, f"package/dist/{name}") for name in ("uPlot.iife.min.js", "uPlot.min.css"))
        return cls(script, style)


def html(board: Dashboard, record: Record, plotter: Plotter) -> str:
    """Raises PageError where the record answers what another form of the dashboard asked."""
    answers = record.boards.get(board.name)
    if answers is None or answers.digest != board.digest:
        raise PageError(f"the record is of other dashboards: {board.name} is {board.digest}; ask a server again")
    span = record.span
    told: Json = {
        "title": board.title,
        "story": record.story,
        "step_s": span.step_s,
        "times_s": [index * span.step_s for index in range(span.num_points)],
        "moments": [{"name": name, "at_s": at_s - span.start_s} for name, at_s in record.moments.items()],
        "panels": [_panel(panel, lines) for panel, lines in zip(board.panels, answers.panels, strict=True)],
    }
    parts = {
        "/* uPlot's style */": plotter.style,
        ">null<": ">" + json.dumps(told).replace("<", "\\u003c") + "<",
        "/* uPlot */": plotter.script,
    }
    found = re.compile("|".join(map(re.escape, parts)))
    return found.sub(lambda match: parts[match[0]], _TEMPLATE.read_text(encoding="utf-8"))


def _panel(panel: Panel, answers: Sequence[Sequence[Line]]) -> Json:
    head = {"title": panel.title, "description": panel.description, "unit": panel.unit, "kind": panel.kind}
    if panel.kind == "heatmap":
        return {**head, "rows": _rows(answers[0])}
    told = [
        (_legend(query.legend, line.labels), line.values)
        for query, found in zip(panel.queries, answers, strict=True)
        for line in found
        if any(value is not None for value in line.values)
    ]
    lines = sorted(told, key=lambda line: line[0])
    moving = [(name, values) for name, values in lines if any(values)]
    shown = moving or lines
    return {
        **head,
        "lines": [{"name": name, "values": list(values)} for name, values in shown],
        "num_zero": len(lines) - len(shown),
    }


def _rows(buckets: Sequence[Line]) -> list[Json]:
    """Of what fell into each bucket alone, from the one below the first filled one to the one above the last."""
    buckets = sorted(buckets, key=lambda line: float(line.labels["le"]))
    below = [0.0] * (len(buckets[0].values) if buckets else 0)
    rates: list[list[float]] = []
    for bucket in buckets:
        cumulated = [value or 0.0 for value in bucket.values]
        fell = zip(cumulated, below, strict=True)
        # Sums of rates of the same events differ in their last digits: that is no event.
        rates.append([value - least if value - least > 1e-9 * value else 0.0 for value, least in fell])
        below = cumulated
    filled = [index for index, row in enumerate(rates) if any(row)]
    first, last = (max(0, filled[0] - 1), filled[-1] + 2) if filled else (0, len(rates))
    return [
        {"up_to": None if bucket.labels["le"] == "+Inf" else float(bucket.labels["le"]), "rates": list(row)}
        for bucket, row in zip(buckets[first:last], rates[first:last], strict=True)
    ]


def _legend(pattern: str, labels: Mapping[str, str]) -> str:
    text = re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), pattern)
    return text or ", ".join(f"{key}={value}" for key, value in labels.items())


def _text(archive: tarfile.TarFile, name: str) -> str:
    member = archive.extractfile(name)
    if member is None:
        raise PageError(f"{_PACKAGE} has no file {name}")
    return member.read().decode()

"""The parts of docs/operations.md that follow from the code and from kept runs. A test compares them.

python -m tests.support.operations_page    writes them anew
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast, get_args

from prometheus_client.metrics_core import Metric
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from cluster.config import PoolConfig, SluiceConfig
from cluster.metrics import Metrics

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operations.md"
CHAOS = ROOT / "docs" / "chaos.json"
SOAK = ROOT / "docs" / "soak.json"


def page() -> str:
    """What the page is to say, with whatever people wrote between the marked parts."""
    text = PAGE.read_text()
    parts = {"chaos": chaos_table(), "soak": soak_table(), "config": config_table(), "metrics": metrics_table()}
    for name, table in parts.items():
        begin, end = f"<!-- {name}: written by tests/support/operations_page.py -->", f"<!-- end of {name} -->"
        assert text.count(begin) == text.count(end) == 1, f"{PAGE.name} has no part {name!r}"
        text = re.sub(f"(?s){re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n{table}\n{end}", text)  # noqa: B023
    return text


def config_table() -> str:
    rows = [f"| `{path}` | {default} | {meaning} |" for path, default, meaning in _keys(SluiceConfig, "")]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


def metrics_table() -> str:
    families = cast(list[Metric], list(Metrics().registry.collect()))
    metrics = {metric._name: metric for metric in vars(Metrics()).values() if hasattr(metric, "_labelnames")}
    rows: list[str] = []
    for family in families:
        labels = ", ".join(metrics[family.name]._labelnames)
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *rows])


def chaos_table() -> str:
    """Of the kept runs: docs/chaos.json."""
    columns = ("fault", "times, in states", "requests touched", "noticed", "next token", "whole again, p50 / p99 each")
    parts: list[str] = []
    for run in json.loads(CHAOS.read_text())["runs"]:
        counts = run["counts"]
        found = ", ".join(f"{count} {sort}" for sort, count in run["findings"].items()) or "nothing"
        told = [
            f"{counts['faults']} faults in {run['elapsed_s'] / 60:.0f} minutes, seed {run['seed']}, "
            f"commit {run['commit'][:7]}, {run['busy_cores_share']:.0%} of all cores busy: "
            f"{counts['requests']} requests, {counts['tokens']} tokens, "
            f"{counts.get('moved', 0)} requests went on elsewhere, "
            f"{counts.get('with their ingress', 0)} ended with their ingress; found: {found}.",
            "",
            f"| {' | '.join(columns)} |",
            "|---|---|---|---|---|---|",
        ]
        for what, kind in run["kinds"].items():
            states = ", ".join(f"{state} {count}" for state, count in kind["states"].items())
            times = [_times(kind.get(name)) for name in ("notice", "recovery", "healed")]
            told.append(f"| {what} | {kind['faults']}: {states} | {kind['requests_touched']} | {' | '.join(times)} |")
        parts.append("\n".join(told))
    return "\n\n".join(parts)


def soak_table() -> str:
    """Of the kept run: docs/soak.json. Of all processes the one that grew most."""
    run = json.loads(SOAK.read_text())
    rows = ["| what | processes | most growth, of | its noise | flat |", "|---|---|---|---|---|"]
    for what, processes in run["growth"].items():
        worst = max(processes, key=lambda name: processes[name]["growth"])
        told = processes[worst]
        flat = "yes" if all(each["flat"] for each in processes.values()) else "**no**"
        rows.append(
            f"| {what} | {len(processes)} | {told['growth']:+.1f}, {worst}: {told['first']:.1f} to {told['last']:.1f} "
            f"| {told['noise']:.1f} | {flat} |"
        )
    return "\n".join(rows)


def _times(told: dict[str, float] | None) -> str:
    return "–" if told is None else f"{told['p50_ms'] / 1e3:.2f} / {told['p99_ms'] / 1e3:.2f} s"


def _keys(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{path}.")
        elif PoolConfig in get_args(kind):
            yield path, "prefill and decode", _one_line(field.description)
            yield from _keys(PoolConfig, f"{path}.NAME.")
        else:
            yield path, _default(field.default), _one_line(field.description)


def _default(value: object) -> str:
    if value is PydanticUndefined:
        return "–"
    if value is None or value == ():
        return "none"
    return f"`{json.dumps(value)}`" if isinstance(value, str | bool) else f"`{value}`"


def _one_line(text: str | None) -> str:
    assert text, "every key says what it means"
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()

"""A dashboard drawn from a server's answers, for pages and for whoever has no Grafana: figures of matplotlib."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from helm.panels import Dashboard, Panel
from helm.prometheus import Prometheus, Series, Span

_COLUMNS: Final = 3
_PANEL_INCHES: Final = (5.2, 3.1)
_SHOWN: Final = 9  # lines named in a legend
_COLORS: Final = (
    "#3274d9", "#e0752d", "#299c46", "#b0413e", "#8f3bb8", "#c9a227", "#1f9e9e", "#d15b9b", "#7a7a7a", "#5e4b3c",
)  # fmt: skip
_GREY: Final = "#666666"


@dataclass(frozen=True, slots=True)
class Story:
    """What a picture shows beside the figures: its first line, and moments (Unix) that are marked."""

    title: str
    moments: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Line:
    name: str
    values: np.ndarray  # [points], NaN where nothing is told

    @property
    def is_told(self) -> bool:
        return bool(np.isfinite(self.values).any())

    @property
    def is_zero(self) -> bool:
        return self.is_told and not np.nan_to_num(self.values).any()


def draw(dashboard: Dashboard, server: Prometheus, app: str, span: Span, story: Story) -> Figure:
    """Raises what the server's questions raise."""
    num_rows = math.ceil(len(dashboard.panels) / _COLUMNS)
    width, height = _PANEL_INCHES
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(_COLUMNS * width, num_rows * height + 0.6), layout=layout)
    figure.suptitle(f"{dashboard.title} · {story.title}", x=0.008, ha="left", fontsize=13)
    grid = figure.subplots(num_rows, _COLUMNS, squeeze=False).flatten()
    for panel, axes in zip(dashboard.panels, grid, strict=False):
        answers = [server.between(query.expr, span, app) for query in panel.queries]
        _draw_panel(axes, panel, answers, span, story)
    for axes in grid[len(dashboard.panels) :]:
        axes.set_visible(False)
    return figure


def _draw_panel(axes: Axes, panel: Panel, answers: Sequence[Sequence[Series]], span: Span, story: Story) -> None:
    times_s = span.step_s * np.arange(int((span.end_s - span.start_s) / span.step_s) + 1)
    if panel.kind == "heatmap":
        _draw_heat(axes, panel, answers[0], times_s, span)
    else:
        lines = [
            _Line(_legend(query.legend, each.labels), _on_grid(each, times_s, span))
            for query, series in zip(panel.queries, answers, strict=True)
            for each in series
        ]
        _draw_lines(axes, panel, sorted(lines, key=lambda line: line.name), times_s)
    for moment_s in story.moments.values():
        axes.axvline(moment_s - span.start_s, color=_GREY, linewidth=0.9, linestyle=(0, (3, 3)))
    axes.set_xlim(times_s[0], times_s[-1])
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 3, 6, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value) // 60}:{int(value) % 60:02}"))
    axes.tick_params(labelsize=8, colors="#333333", length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    described = textwrap.fill(panel.description, 84)
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", pad=8 + 9.5 * (1 + described.count("\n")))
    axes.text(0, 1.02, described, transform=axes.transAxes, fontsize=7.5, color=_GREY, va="bottom")


def _draw_lines(axes: Axes, panel: Panel, lines: Sequence[_Line], times_s: np.ndarray) -> None:
    moving = [line for line in lines if line.is_told and not line.is_zero]
    still = [line for line in lines if line.is_zero]
    shown = moving if moving else still
    if panel.kind == "stack":
        below = np.zeros_like(times_s)
        told = np.isfinite([line.values for line in lines]).any(axis=0) if lines else np.zeros_like(times_s, bool)
        for number, line in enumerate(shown):
            color = _COLORS[number % len(_COLORS)]
            above = below + np.nan_to_num(line.values)
            axes.fill_between(times_s, below, above, where=told, color=color, alpha=0.45, linewidth=0)
            edge = np.where(told, above, np.nan)
            axes.plot(times_s, edge, color=color, linewidth=1, label=line.name if number < _SHOWN else None)
            below = above
    else:
        for number, line in enumerate(shown):
            label = line.name if number < _SHOWN else None
            axes.plot(times_s, line.values, color=_COLORS[number % len(_COLORS)], linewidth=1.4, label=label)
    top = max((float(np.nanmax(line.values)) for line in moving), default=0.0)
    axes.set_ylim(0, axes.get_ylim()[1] if top > 0 else 1)
    if panel.unit == "percentunit":
        axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value, panel.unit)))
    axes.grid(color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    if not any(line.is_told for line in lines):
        axes.text(0.5, 0.5, "nothing told", transform=axes.transAxes, ha="center", color=_GREY)
    unnamed = len(shown) - _SHOWN
    rest = [f"and {unnamed} more"] if unnamed > 0 else []
    rest += [f"and {len(still)} at 0"] if moving and still else []
    for text in rest:
        axes.plot([], [], " ", label=text)
    if axes.get_legend_handles_labels()[0]:
        longest = max(len(str(text)) for text in axes.get_legend_handles_labels()[1])
        columns = 4 if longest <= 14 else 3 if longest <= 22 else 2
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=columns, fontsize=7.5, frameon=False,
            handlelength=1.2, columnspacing=1.2, borderaxespad=0.2,
        )  # fmt: skip


def _draw_heat(axes: Axes, panel: Panel, answer: Sequence[Series], times_s: np.ndarray, span: Span) -> None:
    """Rows are buckets, from zero up to the last one that anything fell into."""
    bounds = sorted(answer, key=lambda series: float(series.labels["le"]))
    cumulated = np.array([np.nan_to_num(_on_grid(each, times_s, span)) for each in bounds])
    counts = np.diff(cumulated, axis=0, prepend=0.0).clip(min=0.0)
    filled = np.flatnonzero(counts.sum(axis=1))
    low, high = (max(0, int(filled[0]) - 1), int(filled[-1]) + 2) if filled.size else (0, len(bounds))
    counts, bounds = counts[low:high], bounds[low:high]
    edges_s = np.append(times_s - span.step_s / 2, times_s[-1] + span.step_s / 2)
    most = float(counts.max()) or 1.0
    drawn = axes.pcolormesh(edges_s, np.arange(len(bounds) + 1), counts, cmap="Oranges", vmin=0, vmax=most)
    labels = [written(float(each.labels["le"]), panel.unit) for each in bounds]
    axes.set_yticks(np.arange(1, len(bounds) + 1), ["more" if text == "inf" else f"≤ {text}" for text in labels])
    assert axes.figure is not None
    bar = axes.figure.colorbar(drawn, cax=axes.inset_axes((1.01, 0.0, 0.02, 1.0)))
    bar.ax.tick_params(labelsize=7, length=2)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{written(value, 'short')}/s"))
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue] (its type is that of an axes' outline)


def _on_grid(series: Series, times_s: np.ndarray, span: Span) -> np.ndarray:
    """Prometheus leaves out the points at which a series was not there."""
    values = np.full(len(times_s), np.nan)
    for at_s, value in zip(series.times_s, series.values, strict=True):
        index = round((at_s - span.start_s) / span.step_s)
        if 0 <= index < len(values):
            values[index] = value if math.isfinite(value) else math.nan
    return values


def _legend(pattern: str, labels: Mapping[str, str]) -> str:
    text = re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), pattern)
    return text or ", ".join(f"{key}={value}" for key, value in labels.items())


def written(value: float, unit: str) -> str:
    """A figure in one of Grafana's units, as short as a tick wants it."""
    return _UNITS[unit](value) if unit in _UNITS else f"{_scaled(value, 1000, ('', 'k', 'M', 'G'))}{_suffix(unit)}"


def _suffix(unit: str) -> str:
    return unit.removeprefix("suffix:") if unit.startswith("suffix:") else ""


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return "inf"
    if value >= 60:
        return f"{value / 60:.3g} min"
    if value >= 1 or value == 0:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def _scaled(value: float, base: float, prefixes: Sequence[str]) -> str:
    power = 0
    while abs(value) >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    return f"{value:.3g} {prefixes[power]}".rstrip()


_UNITS: Final[Mapping[str, Callable[[float], str]]] = {
    "s": _seconds,
    "percentunit": lambda value: f"{value:.0%}",
    "ops": lambda value: f"{_scaled(value, 1000, ('', 'k'))} /s",
    "reqps": lambda value: f"{_scaled(value, 1000, ('', 'k'))} req/s",
    "Bps": lambda value: f"{_scaled(value, 1000, ('', 'k', 'M', 'G', 'T'))}B/s",
}

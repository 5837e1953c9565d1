"""The goodput sweep in one picture: goodput, first token and pauses over the rate, a line for each app."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.goodput_scenario import DISAGGREGATED, Objectives
from benchmarks.latency import Summary
from benchmarks.report import Setting

_OURS, _GREY = "#0b7285", "#868e96"
_OTHERS = ("#fab005", "#fd7e14", "#e8590c", "#c92a2a", "#862e9c", "#5f3dc4", "#343a40")  # by budget, small to large
_FOOTER_CHARS = 190  # of a line


def draw(path: Path, runs: Sequence[Summary], objectives: Objectives, *, title: str, setting: Setting) -> None:
    """Writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    labels = sorted({run.mode for run in runs if run.mode != DISAGGREGATED}, key=lambda label: int(label.split()[-1]))
    colours = {DISAGGREGATED: _OURS, **{label: _OTHERS[i % len(_OTHERS)] for i, label in enumerate(labels)}}
    style: dict[Any, Any] = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context({**style, "axes.edgecolor": _GREY, "axes.titleweight": "bold", "axes.titlesize": 10.5}):
        figure, (good, first, gap) = pyplot.subplots(1, 3, figsize=(11.5, 4.6), dpi=110)
        for label, colour in colours.items():
            mine = sorted((run for run in runs if run.mode == label), key=lambda run: run.rate)
            rates = [run.rate for run in mine]
            line = {
                "color": colour,
                "marker": "o",
                "markersize": 4,
                "linewidth": 2.4 if label == DISAGGREGATED else 1.2,
            }
            good.plot(rates, [run.goodput for run in mine], label=label, **line)
            first.plot(rates, [1e3 * run.ttft_p99 for run in mine], **line)
            gap.plot(rates, [1e3 * run.gap_p99 for run in mine], **line)
        offered = [0.0, max((run.rate for run in runs), default=1.0)]
        good.plot(offered, offered, color=_GREY, linewidth=1, linestyle=":", zorder=0, label="offered")
        for axes, limit in ((first, objectives.ttft_s), (gap, objectives.inter_token_s)):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.axhline(1e3 * limit, color=_GREY, linewidth=1, linestyle=":", zorder=0)
        for axes, name, unit in (
            (good, "goodput", "requests/s"),
            (first, "time to first token, p99", "ms"),
            (gap, "between two tokens, p99", "ms"),
        ):
            axes.set_title(name, loc="left")
            axes.set_ylabel(unit)
            axes.set_xlabel("requests/s offered")
            axes.set_xlim(left=0)
            axes.grid(axis="y", color="#dee2e6", linewidth=0.7)
        good.set_ylim(bottom=0)
        figure.suptitle(title, x=0.012, y=0.985, ha="left", fontsize=9.5, fontweight="bold")
        figure.legend(loc="upper left", ncols=5, frameon=False, bbox_to_anchor=(0.004, 0.955), fontsize=8.5)
        footer = f"{setting.hardware}; {setting.software}; commit {setting.commit}; dotted: the objectives"
        figure.text(0.012, 0.012, textwrap.fill(footer, _FOOTER_CHARS), color=_GREY, fontsize=7)
        figure.tight_layout(rect=(0, 0.06, 1, 0.86), w_pad=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)

"""Serving in one picture: first token, inter-token latency and goodput over the rate, one colour for each mode."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.latency import Slo, Summary

_COLOURS = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e")
_GREY = "#868e96"
_FOOTER_CHARS = 200  # of a line
_LINES: Sequence[tuple[float, Literal["-", "--"]]] = ((2.0, "-"), (1.2, "--"))  # median, 99th percentile


def draw(path: Path, summaries: Sequence[Summary], slo: Slo, *, title: str, footer: str) -> None:
    """Writes a PNG. Summaries without a rate are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    labels = list(dict.fromkeys(summary.label for summary in summaries))
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with pyplot.rc_context({**style, "axes.edgecolor": _GREY, "axes.titleweight": "bold", "axes.titlesize": 10.5}):
        figure, (first, gap, good) = pyplot.subplots(1, 3, figsize=(11, 4.3), dpi=110)
        for label, colour in zip(labels, _COLOURS, strict=False):
            runs = sorted((s for s in summaries if s.label == label and s.rate), key=lambda s: s.rate)
            rates = [run.rate for run in runs]
            solid = {"color": colour, "marker": "o", "markersize": 4.5, "linewidth": 2}
            faint = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.2, "linestyle": "--"}
            first.plot(rates, [1e3 * run.ttft_p50 for run in runs], **solid)
            first.plot(rates, [1e3 * run.ttft_p99 for run in runs], **faint)
            gap.plot(rates, [1e3 * run.inter_token_p50 for run in runs], **solid)
            gap.plot(rates, [1e3 * run.inter_token_p99 for run in runs], **faint)
            good.plot(rates, [run.goodput for run in runs], **solid)
        offered = sorted({summary.rate for summary in summaries if summary.rate})
        good.plot([0, *offered], [0, *offered], color=_GREY, linewidth=1, linestyle=":", zorder=0)
        good.annotate(
            "offered",
            (offered[-1], offered[-1]),
            (-16, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            color=_GREY,
        )
        for axes, limit in ((first, slo.ttft_s), (gap, slo.inter_token_s)):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.axhline(1e3 * limit, color=_GREY, linewidth=1, linestyle=":", zorder=0)
            axes.annotate(
                "objective",
                (0.015, 1e3 * limit),
                (0, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                color=_GREY,
                fontsize=8.5,
            )
        good.set_ylim(bottom=0)
        for axes, name, unit in (
            (first, "time to first token", "ms"),
            (gap, "inter-token latency", "ms"),
            (good, "goodput: both objectives kept", "requests/s"),
        ):
            axes.set_title(name, loc="left")
            axes.set_ylabel(unit)
            axes.set_xlabel("requests/s offered")
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            axes.grid(axis="y", color="#dee2e6", linewidth=0.7)
        handles = [
            Line2D([], [], color=c, linewidth=2, marker="o", markersize=4.5)
            for c, _ in zip(_COLOURS, labels, strict=False)
        ]
        handles += [Line2D([], [], color=_GREY, linewidth=w, linestyle=s) for w, s in _LINES]
        figure.suptitle(title, x=0.012, y=0.985, ha="left", fontsize=12, fontweight="bold")
        figure.legend(
            handles,
            [*labels, "median", "99th percentile"],
            loc="upper left",
            ncols=len(handles),
            frameon=False,
            bbox_to_anchor=(0.004, 0.945),
        )
        figure.text(0.012, 0.015, textwrap.fill(footer, _FOOTER_CHARS), color=_GREY, fontsize=7.5)
        figure.tight_layout(rect=(0, 0.07, 1, 0.92), w_pad=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)

"""Policies in one picture: hit rate, time to the first token and goodput over the rate of arrivals."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.simulator.outcome import Objective, Outcome

_COLOURS = ("#0b7285", "#e8590c", "#5f3dc4")
_GREY = "#868e96"


def draw(path: Path, outcomes: Sequence[Outcome], objective: Objective, *, title: str, footer: str) -> None:
    """Writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator, PercentFormatter, StrMethodFormatter

    policies = list(dict.fromkeys(outcome.policy for outcome in outcomes))
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _GREY,
        "axes.titleweight": "bold",
        "axes.titlesize": 10.5,
    }
    with pyplot.rc_context(style):
        figure, (hits, first, good) = pyplot.subplots(1, 3, figsize=(11, 4.3), dpi=110)
        for policy, colour in zip(policies, _COLOURS, strict=False):
            runs = sorted((each for each in outcomes if each.policy == policy), key=lambda each: each.rate)
            rates = [run.rate for run in runs]
            solid: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4.5, "linewidth": 2}
            faint: dict[str, Any] = {**solid, "markersize": 3, "linewidth": 1.2, "linestyle": "--"}
            hits.plot(rates, [run.hit_rate for run in runs], label=policy, **solid)
            first.plot(rates, [1e3 * run.ttft_p50 for run in runs], **solid)
            first.plot(rates, [1e3 * run.ttft_p99 for run in runs], **faint)
            good.plot(rates, [run.goodput for run in runs], **solid)
        offered = [0, max(each.rate for each in outcomes)]
        good.plot(offered, offered, color=_GREY, linewidth=1, linestyle=":", zorder=0)
        good.annotate(
            "arrived", (offered[1], offered[1]), (-16, 0), textcoords="offset points", ha="right", va="top", color=_GREY
        )
        first.set_yscale("log")
        first.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        first.yaxis.set_minor_locator(NullLocator())
        first.axhline(1e3 * objective.ttft_s, color=_GREY, linewidth=1, linestyle=":", zorder=0)
        hits.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        hits.set_ylim(0, 1)
        good.set_ylim(bottom=0)
        for axes, name, unit in (
            (hits, "prompt tokens found in a cache", ""),
            (first, "time to first token: median, p99 dashed", "ms"),
            (good, "goodput: both objectives kept", "requests/s"),
        ):
            axes.set_title(name, loc="left", fontsize=9.5)
            axes.set_ylabel(unit)
            axes.set_xlabel("requests/s")
            axes.set_xlim(left=0)
            axes.grid(axis="y", color="#dee2e6", linewidth=0.7)
        figure.suptitle(title, x=0.012, y=0.985, ha="left", fontsize=12, fontweight="bold")
        figure.legend(loc="upper left", ncols=len(policies), frameon=False, bbox_to_anchor=(0.004, 0.945))
        limits = f"objectives: first token within {objective.ttft_s:g} s, {1e3 * objective.gap_s:g} ms between tokens"
        figure.text(0.012, 0.015, textwrap.fill(f"{limits}; {footer}", 190), color=_GREY, fontsize=7.5)
        figure.tight_layout(rect=(0, 0.06, 1, 0.92), w_pad=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)

"""A day in one picture: requests that arrive, and the workers of both pools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.simulator.scaling import Moment

_GREY = "#868e96"


def draw(path: Path, moments: Sequence[Moment], *, title: str, footer: str) -> None:
    """Writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    with pyplot.rc_context({"font.family": "DejaVu Sans", "font.size": 9.5, "axes.edgecolor": _GREY}):
        figure, (load, pools) = pyplot.subplots(2, 1, figsize=(9, 4.6), dpi=110, sharex=True)
        hours = [moment.at_s / 3600 for moment in moments]
        load.fill_between(hours, [moment.rate for moment in moments], color=_GREY, alpha=0.35, linewidth=0)
        load.set_ylabel("requests/s")
        pools.step(hours, [m.num_prefill for m in moments], where="post", color="#e8590c", linewidth=2, label="prefill")
        pools.step(hours, [m.num_decode for m in moments], where="post", color="#0b7285", linewidth=2, label="decode")
        pools.set_ylabel("workers")
        pools.set_xlabel("hours")
        pools.yaxis.set_major_locator(MaxNLocator(integer=True))
        pools.legend(frameon=False, loc="upper left")
        for axes in (load, pools):
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#dee2e6", linewidth=0.7)
        figure.suptitle(title, x=0.012, y=0.985, ha="left", fontsize=12, fontweight="bold")
        figure.text(0.012, 0.012, footer, color=_GREY, fontsize=7.5)
        figure.tight_layout(rect=(0, 0.03, 1, 0.97))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)

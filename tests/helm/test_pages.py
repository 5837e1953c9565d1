"""A page of a dashboard shows what was answered, and nothing else."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from helm.chromium import ChromiumError, screenshot
from helm.dashboards import DASHBOARDS
from helm.page import PageError, Plotter, html
from helm.panels import Dashboard, Panel, Query
from helm.prometheus import Series, Span
from helm.record import Answers, Line, Record, on_grid
from tests.support.browser import can_draw, page

EVIL = '</script><img src=x onerror="window.seen=1">'
SPAN = Span(1000.0, 1060.0, 1.0, 10.0)
BOARD = Dashboard(
    "small",
    "Small",
    "One panel of each kind, and an empty one.",
    (
        Panel("Lines", "Of waves.", "s", (Query("a", "{{name}}"), Query("b", "all"))),
        Panel("Stack", "Of three.", "reqps", (Query("c", "{{name}}"),), "stack"),
        Panel("Heat", "Of buckets.", "s", (Query("d", "{{le}}"),), "heatmap"),
        Panel("Empty", "Of nothing.", "short", (Query("e"),)),
    ),
)


def line(level: float, **labels: str) -> Line:
    values = tuple(None if 20 <= at < 25 else level * (2 + math.sin(at / 9)) for at in range(SPAN.num_points))
    return Line(labels=labels, values=values)


def record() -> Record:
    buckets = [line(level, le=bound) for level, bound in ((0, "0.1"), (4, "1.0"), (4, "2.5"), (9, "5.0"), (9, "+Inf"))]
    panels = (
        ((line(0.1, name=EVIL), line(0.0, name="idle"), line(0.2, name="worker")), (line(0.3),)),
        (tuple(line(level, name=f"part-{level}") for level in (1, 2, 3)),),
        (tuple(reversed(buckets)),),
        ((),),
    )
    boards = {BOARD.name: Answers(digest=BOARD.digest, panels=panels)}
    return Record(app="chat", story="by hand", moments={"a moment": 1030.0}, span=SPAN, boards=boards)


def test_a_record_is_read_as_it_was_written() -> None:
    assert Record.model_validate_json(record().model_dump_json()) == record()


def test_points_that_are_not_told_are_gaps() -> None:
    series = Series({"name": "a"}, (1000.0, 1001.0, 1003.001, 1060.0), (1.0, math.nan, 3.0, math.inf))
    found = on_grid(series, SPAN)
    assert len(found.values) == 61
    assert {at: value for at, value in enumerate(found.values) if value is not None} == {0: 1.0, 3: 3.0}


def test_a_page_holds_what_was_answered() -> None:
    text = html(BOARD, record(), Plotter("/* the script */", "/* the style */"))
    assert "/* the script */" in text and "/* the style */" in text and EVIL not in text
    found = re.search(r'id="board">(.*)</script>', text)
    assert found is not None
    told = json.loads(found[1])
    lines, stack, heat, empty = told["panels"]
    assert told["moments"] == [{"name": "a moment", "at_s": 30.0}] and len(told["times_s"]) == 61
    assert [each["name"] for each in lines["lines"]] == [EVIL, "all", "worker"] and lines["num_zero"] == 1
    assert lines["lines"][1]["values"] == list(line(0.3).values)
    assert [each["name"] for each in stack["lines"]] == ["part-1", "part-2", "part-3"] and stack["num_zero"] == 0
    # Cumulated buckets in any order; each row is what fell between its bound and the one below.
    assert [row["up_to"] for row in heat["rows"]] == [0.1, 1.0, 2.5, 5.0, None]
    assert [row["rates"][0] for row in heat["rows"]] == pytest.approx([0, 8, 0, 10, 0])
    assert empty["lines"] == []


def test_a_record_of_other_dashboards_is_refused() -> None:
    with pytest.raises(PageError, match="the record is of other dashboards: overview"):
        html(DASHBOARDS[0], record(), Plotter("", ""))


def test_another_package_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "uplot-1.6.32.tgz").write_bytes(b"something else")
    with pytest.raises(PageError, match=r"is not uplot@1\.6\.32, its digest is sha512-.*: remove it"):
        Plotter.fetch(tmp_path)


# Of each plot: how many of its pixels are not blank, and in how many colours.
_DRAWN = """
[...document.querySelectorAll(".plot canvas")].map(canvas => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height), colors = new Set();
  let filled = 0;
  for (let i = 0; i < data.length; i += 4) {
    if (data[i + 3] < 255) continue;
    filled += 1;
    colors.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);
  }
  return [filled, [...colors]];
})
"""
_LEGENDS = "[...document.querySelectorAll('ul')].map(legend => [...legend.children].map(item => item.textContent))"


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.skipif(not can_draw(), reason="needs Chromium and npm")
def test_a_page_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "small.html"
    path.write_text(html(BOARD, record(), Plotter.fetch()))
    with page() as shown:
        shown.look(width=1440)
        shown.open(path.as_uri())
        shown.until("document.querySelectorAll('.plot canvas').length === 4", "four plots")
        shown.until(f"{_DRAWN}.every(([filled]) => filled)", "no plot is blank")
        lines, stack, heat, empty = ((filled, set(colors)) for filled, colors in shown.js(_DRAWN))
        assert {0x3274D9, 0xE0752D, 0x299C46} <= lines[1] and 0x299C46 in stack[1] - empty[1]
        assert 0x7F2704 in heat[1] and 0x7F2704 not in stack[1], "the most is the darkest"
        assert heat[0] > 2 * empty[0]
        assert shown.js("document.querySelector('.plot .none').textContent") == "nothing told"
        legends = shown.js(_LEGENDS)
        assert legends[0] == [EVIL, "all", "worker", "and 1 at 0"]
        assert legends[1] == ["part-1", "part-2", "part-3"]
        assert shown.js("window.seen") is None and shown.complaints == []
    picture = screenshot(path)
    assert picture.width == 1440 and 500 < picture.height < 1200
    assert len(picture.getcolors(1 << 24) or ()) > 100
    path.write_text(path.read_text().replace('"kind": "stack"', '"kind": "heatmap"'))
    with pytest.raises(ChromiumError, match="TypeError"):
        screenshot(path)

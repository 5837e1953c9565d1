"""What a server answered to all dashboards, kept as JSON: pages can be drawn anew without the server."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from helm.dashboards import DASHBOARDS
from helm.panels import Dashboard
from helm.prometheus import Prometheus, Series, Span


class Line(BaseModel):
    """`values` at each step of the record's span, None where nothing was told."""

    model_config = ConfigDict(frozen=True)

    labels: dict[str, str]
    values: tuple[float | None, ...]


class Answers(BaseModel):
    """The lines of each query of each panel, as the dashboard of this digest asked."""

    model_config = ConfigDict(frozen=True)

    digest: str
    panels: tuple[tuple[tuple[Line, ...], ...], ...]


class Record(BaseModel):
    """`story` is the first line of a page, `moments` (Unix) are marked in it."""

    model_config = ConfigDict(frozen=True)

    app: str
    story: str
    moments: dict[str, float]
    span: Span
    boards: dict[str, Answers]


def ask(server: Prometheus, app: str, span: Span, story: str, moments: Mapping[str, float]) -> Record:
    """Raises what the server's questions raise."""

    def answers(board: Dashboard) -> Answers:
        panels = tuple(
            tuple(
                tuple(on_grid(each, span) for each in server.between(query.expr, span, app)) for query in panel.queries
            )
            for panel in board.panels
        )
        return Answers(digest=board.digest, panels=panels)

    boards = {board.name: answers(board) for board in DASHBOARDS}
    return Record(app=app, story=story, moments=dict(moments), span=span, boards=boards)


def on_grid(series: Series, span: Span) -> Line:
    """Prometheus leaves out the points at which a series was not there."""
    values: list[float | None] = [None] * span.num_points
    for at_s, value in zip(series.times_s, series.values, strict=True):
        index = round((at_s - span.start_s) / span.step_s)
        if 0 <= index < len(values) and math.isfinite(value):
            values[index] = value
    return Line(labels=dict(series.labels), values=tuple(values))

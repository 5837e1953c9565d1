"""What dashboards are made of, as plain values, and how Grafana writes them down."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Final, Literal

from grafana_foundation_sdk.builders import common, heatmap, prometheus, timeseries
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from helm.schema import Json

_SOURCE: Final = DataSourceRef(type_val="prometheus", uid="$source")
_WIDTH: Final = 8  # of 24 columns
_HEIGHT: Final = 7


@dataclass(frozen=True, slots=True)
class Query:
    """`legend` may name labels as {{name}}."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """`unit` in Grafana's words. A heat map has one query, by `le`."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["lines", "stack", "heatmap"] = "lines"


@dataclass(frozen=True, slots=True)
class Dashboard:
    name: str
    title: str
    description: str
    panels: tuple[Panel, ...]

    @property
    def digest(self) -> str:
        """Of all that it shows: a picture of it bears this."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def text(self) -> str:
        """The JSON that Grafana imports."""
        builder = (
            dashboards.Dashboard(f"sluice: {self.title}")
            .uid(f"sluice-{self.name}")
            .description(self.description)
            .tags(["sluice"])
            .refresh("15s")
            .time("now-1h", "now")
            .tooltip(DashboardCursorSync.CROSSHAIR)
            .with_variable(dashboards.DatasourceVariable("source").label("Prometheus").type("prometheus"))
            .with_variable(_label_variable("app", "label_values(sluice_ingress_open_requests, app)"))
        )
        for panel in self.panels:
            builder.with_panel(_build(panel))
        tree = _without_nulls(json.loads(JSONEncoder().encode(builder.build())))
        return json.dumps(tree, indent=1, sort_keys=True) + "\n"


def _without_nulls(node: Json) -> Json:
    if isinstance(node, dict):
        return {key: _without_nulls(each) for key, each in node.items() if each is not None}
    return [_without_nulls(each) for each in node] if isinstance(node, list) else node


def _label_variable(name: str, query: str) -> dashboards.QueryVariable:
    return (
        dashboards.QueryVariable(name).datasource(_SOURCE).query(query).refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    )


def _build(panel: Panel) -> timeseries.Panel | heatmap.Panel:
    if panel.kind == "heatmap":
        (query,) = panel.queries
        target = prometheus.Dataquery().expr(query.expr).format(PromQueryFormat.HEATMAP).legend_format("{{le}}")
        colors = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
        axis = heatmap.YAxisConfig().unit(panel.unit)
        drawn = (
            heatmap.Panel().calculate(False).show_tooltip().color(colors).y_axis(axis).with_target(target.ref_id("A"))
        )
    else:
        drawn = timeseries.Panel().unit(panel.unit).min(0).fill_opacity(30 if panel.kind == "stack" else 5)
        if panel.kind == "stack":
            drawn.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
        for letter, query in zip("ABCDEFGH", panel.queries, strict=False):
            drawn.with_target(prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(letter))
    return drawn.title(panel.title).description(panel.description).datasource(_SOURCE).span(_WIDTH).height(_HEIGHT)

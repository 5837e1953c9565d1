"""Panels and alerts ask for what processes tell: each metric, label and bucket is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import promql_parser
import pytest
from PIL import Image
from prometheus_client.metrics import MetricWrapperBase

from cluster.metrics import Metrics
from helm.alerts import ALERTS
from helm.dashboards import DASHBOARDS
from helm.pictures import DRAWN
from helm.readme import CHART

ROOT = Path(__file__).parents[2]
TARGET = {"app", "model", "role", "name", "incarnation", "job", "instance"}  # of a scraped process: deploy.prometheus
EXPRESSIONS = [
    *((f"{board.name}: {panel.title}", query.expr, query.legend)
      for board in DASHBOARDS for panel in board.panels for query in panel.queries),
    *((alert.name, alert.expr, "") for alert in ALERTS),
]  # fmt: skip


@cache
def told() -> dict[str, tuple[set[str], set[str]]]:
    """Sample name -> its labels, and what `le` may be, of every metric of a process."""
    samples: dict[str, tuple[set[str], set[str]]] = {}
    for metric in vars(Metrics()).values():
        if not isinstance(metric, MetricWrapperBase):
            continue
        labels = set(metric._labelnames)
        if labels:
            metric.labels(*labels)
        for family in metric.collect():
            for sample in family.samples:
                seen = samples.setdefault(sample.name, (labels | ({"le"} & sample.labels.keys()), set()))
                seen[1].update({sample.labels["le"]} if "le" in sample.labels else ())
    return samples


def selectors(node: object) -> Iterator[promql_parser.VectorSelector]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    elif isinstance(node, promql_parser.MatrixSelector):
        yield from selectors(node.vector_selector)
    elif isinstance(node, promql_parser.Call):
        for each in node.args:
            yield from selectors(each)
    elif isinstance(node, promql_parser.BinaryExpr):
        yield from (*selectors(node.lhs), *selectors(node.rhs))
    elif isinstance(node, promql_parser.AggregateExpr | promql_parser.ParenExpr | promql_parser.UnaryExpr):
        yield from selectors(node.expr)
    else:
        assert isinstance(node, promql_parser.NumberLiteral), node


def groupings(node: object) -> Iterator[tuple[set[str], object]]:
    """The labels of every aggregation, and what is aggregated."""
    if isinstance(node, promql_parser.AggregateExpr):
        labels = set(node.modifier.labels) if node.modifier is not None else set()
        yield labels, node.expr
        yield from groupings(node.expr)
    elif isinstance(node, promql_parser.BinaryExpr):
        yield from (*groupings(node.lhs), *groupings(node.rhs))
    elif isinstance(node, promql_parser.Call):
        for each in node.args:
            yield from groupings(each)


@pytest.mark.parametrize(("where", "expr", "legend"), EXPRESSIONS, ids=lambda each: each if ":" in each[:12] else "")
def test_an_expression_asks_for_what_is_told(where: str, expr: str, legend: str) -> None:
    tree = promql_parser.parse(expr.replace("$__rate_interval", "5m"))
    found = list(selectors(tree))
    assert found, where
    for selector in found:
        assert selector.name in told(), f"{where}: no process tells {selector.name}"
        labels, bounds = told()[selector.name]
        for matcher in selector.matchers.matchers:
            assert matcher.name in labels | TARGET, f"{where}: {selector.name} has no label {matcher.name}"
            assert matcher.name != "le" or matcher.value in bounds, f"{where}: no bucket ends at {matcher.value}"
    for labels, inner in groupings(tree):
        for selector in selectors(inner):
            assert selector.name is not None
            assert labels <= told()[selector.name][0] | TARGET, f"{where}: {selector.name} lacks some of {labels}"
    outer = next((labels for labels, _ in groupings(tree)), None)
    named = set(re.findall(r"{{(\w+)}}", legend))
    assert outer is None or named <= outer, f"{where}: the legend names what the sum has no more"


def test_dashboards_are_what_grafana_imports() -> None:
    boards = [json.loads(path.read_text()) for path in sorted((CHART / "dashboards").glob("*.json"))]
    assert {board["uid"] for board in boards} == {f"sluice-{board.name}" for board in DASHBOARDS}
    assert len(boards) == 6
    for board in boards:
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
        assert len(set(places)) == len(places) >= 6, "panels lie beside each other"
        assert {variable["name"] for variable in board["templating"]["list"]} == {"source", "app"}
        for panel in board["panels"]:
            assert panel["title"] and panel["description"] and panel["datasource"]["uid"] == "$source"
            assert all('app="$app"' in target["expr"] for target in panel["targets"])


def test_each_dashboard_is_shown_and_explained() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    for board in DASHBOARDS:
        picture = f"images/dashboard-{board.name}.png"
        assert f"**{board.title}.**" in page and f"({picture})" in page
        with Image.open(ROOT / "docs" / picture) as drawn:
            assert drawn.info[DRAWN] == board.digest, "draw it anew: python -m tests.support.observed_app"

"""A real Prometheus scrapes an app under load, cancels and deaths: every panel and every rule finds its series."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from prometheus_client.metrics import MetricWrapperBase

from cluster.metrics import Metrics
from helm import pictures
from helm.alerts import ALERTS
from helm.dashboards import DASHBOARDS
from helm.prometheus import Series
from tests.support.browser import can_draw
from tests.support.observed_app import APP, CANCELLED, NUM_TARGETS, OK, REFUSED, Observed, members, observed
from tests.support.prometheus_server import server
from tests.support.scrape import targets

pytestmark = [pytest.mark.full, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

QUERIES = [
    (f"{board.name}: {panel.title}", query) for board in DASHBOARDS for panel in board.panels for query in panel.queries
]
_COMPARISONS = {"==", "!=", ">", "<", ">=", "<=", "and", "or", "unless"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    if server() is None:
        pytest.skip("needs promtool and its server: no Debian package prometheus")
    with observed(tmp_path_factory.mktemp("prometheus")) as seen:
        yield seen


def ask(seen: Observed, path: str) -> Any:
    return json.loads(seen.server.get(path))["data"]


def untold(seen: Observed) -> list[str]:
    """Panels' questions that got no finite figure since the load began."""
    span = seen.span()
    return [
        f"{where}: {query.expr}" for where, query in QUERIES if not told(seen.server.between(query.expr, span, APP))
    ]


def told(answer: list[Series]) -> bool:
    return any(series.is_told for series in answer)


def operands(node: object) -> Iterator[str]:
    """What an alert compares: the alert itself tells nothing while all is well."""
    if isinstance(node, promql_parser.BinaryExpr) and str(node.op).strip() in _COMPARISONS:
        yield from (*operands(node.lhs), *operands(node.rhs))
    elif isinstance(node, promql_parser.ParenExpr):
        yield from operands(node.expr)
    elif not isinstance(node, promql_parser.NumberLiteral):
        yield node.prettify()  # pyright: ignore[reportAttributeAccessIssue] (all nodes have it)


def test_every_question_of_every_panel_is_answered(seen: Observed) -> None:
    seen.crowd.until(lambda: not untold(seen), "every panel has figures")
    assert seen.server.apps() == [APP]


def test_legends_name_what_the_answers_have(seen: Observed) -> None:
    span = seen.span()
    nameless = [
        f"{where}: {query.legend} of {dict(series.labels)}"
        for where, query in QUERIES
        for series in seen.server.between(query.expr, span, APP)
        if not all(series.labels.get(label) for label in re.findall(r"{{(\w+)}}", query.legend))
    ]
    assert nameless == []


def test_every_alert_compares_figures_and_is_read_without_error(seen: Observed) -> None:
    span = seen.span()
    asked = [(alert.name, each) for alert in ALERTS for each in operands(promql_parser.parse(alert.expr))]
    assert {name for name, _ in asked} == {alert.name for alert in ALERTS} and len(asked) > len(ALERTS)
    assert [(name, expr) for name, expr in asked if not told(seen.server.between(expr, span))] == []
    (group,) = ask(seen, "/api/v1/rules")["groups"]
    assert [(rule["name"], rule["health"]) for rule in group["rules"]] == [(alert.name, "ok") for alert in ALERTS]
    firing = [rule["name"] for rule in group["rules"] if rule["state"] == "firing"]
    assert firing == [], "deaths that are mended at once wake nobody"


def test_targets_are_the_processes_that_live(seen: Observed) -> None:
    """Four workers, two replicas, the controller; the killed ones are forgotten, and no label was refused."""

    def scraped() -> dict[str, str]:
        active = ask(seen, "/api/v1/targets?state=active")["activeTargets"]
        return {each["labels"]["incarnation"]: each["health"] for each in active}

    def as_named() -> bool:
        named = {target.incarnation for target in targets(seen.app.url)}
        return scraped() == dict.fromkeys(named, "up")

    seen.crowd.until(as_named, "Prometheus scrapes those that the app names, and reaches them")
    assert {member.incarnation for member in members()} < scraped().keys()
    assert len(scraped()) == NUM_TARGETS
    assert ask(seen, "/api/v1/targets?state=dropped")["droppedTargets"] == []


def test_series_that_count_from_a_closed_set_began_at_zero(seen: Observed) -> None:
    """rate() does not see the first event of a series that begins with it."""
    families = [family for metric in vars(Metrics()).values() if isinstance(metric, MetricWrapperBase)
                for family in metric.collect()]  # fmt: skip
    first = {(s.name, *sorted(s.labels.items())) for family in families for s in family.samples}
    for name in {name for name, *labels in first if name.endswith("_total") and labels}:
        for series in seen.server.between(f'{name}{{app="{APP}"}}', seen.span()):
            of_target = {"__name__", "app", "model", "role", "name", "incarnation", "job", "instance"}
            labels = {key: value for key, value in series.labels.items() if key not in of_target}
            assert (name, *sorted(labels.items())) in first, f"{name}{labels} was not there from the first"


def test_what_happened_is_in_the_figures(seen: Observed) -> None:
    span = seen.span()

    def most(expr: str) -> float:
        return max((max(series.values) for series in seen.server.between(expr, span)), default=0.0)

    for pool in ("prefill", "decode"):
        assert most(f'sum(sluice_cluster_restarts_total{{pool="{pool}"}})') == 1
        assert most(f'sum(rate(sluice_cluster_restarts_total{{pool="{pool}"}}[10s]))') > 0, "a single death is seen"
    assert most("sum(sluice_ingress_replays_total)") > 0
    outcomes = seen.crowd.outcomes
    assert set(outcomes) == {OK, CANCELLED, REFUSED}, outcomes
    for outcome, label in ((OK, "ok"), (CANCELLED, "cancelled"), (REFUSED, "busy")):
        assert most(f'sum(sluice_ingress_requests_total{{outcome="{label}"}})') > 0, outcome


@pytest.mark.skipif(not can_draw(), reason="needs Chromium and npm")
def test_each_dashboard_is_drawn(seen: Observed, tmp_path: Path) -> None:
    paths = pictures.write(seen.record(), tmp_path, cache=tmp_path)
    assert [path.stem for path in paths] == [f"dashboard-{board.name}" for board in DASHBOARDS]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 50_000

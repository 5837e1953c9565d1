"""The alerts, as rules of Prometheus: `files/rules.yaml` of the chart, and of `promtool` and Prometheus as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import yaml

RUNBOOK: Final = "RUNBOOK_URL"  # which the chart replaces by a value


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """`expr` is true for `wait` before it is told. `summary` may name labels as {{ $labels.name }}."""

    name: str
    expr: str
    wait: str
    severity: Literal["critical", "warning"]
    summary: str

    @property
    def anchor(self) -> str:
        """Of its heading in docs/kubernetes.md."""
        return self.name.lower()


_WHO: Final = "{{ $labels.name }}"
_POOL: Final = "pool {{ $labels.pool }} of {{ $labels.app }}"

ALERTS: Final = (
    Alert(
        name="SluiceNoProgress",
        expr="sluice_engine_running_sequences > 0 and rate(sluice_engine_step_seconds_count[1m]) == 0",
        wait="1m",
        severity="critical",
        summary=f"{_WHO} has sequences to compute and does not step; the controller should have replaced it",
    ),
    Alert(
        name="SluicePoolEmpty",
        expr='sum by (app, model, pool) (sluice_cluster_workers{state="ready"}) == 0',
        wait="1m",
        severity="critical",
        summary=f"{_POOL} has no worker that is ready",
    ),
    Alert(
        name="SluicePoolBelowSize",
        expr='sum by (app, model, pool) (max_over_time(sluice_cluster_workers{state="starting"}[2m])) > 0',
        wait="10m",
        severity="warning",
        summary=f"{_POOL} has fewer workers than it should: some have been starting for ten minutes",
    ),
    Alert(
        name="SluiceRequestsFail",
        expr=(
            'sum by (app, model) (rate(sluice_ingress_requests_total{outcome=~"failed|no_worker|deadline"}[5m]))'
            " / sum by (app, model) (rate(sluice_ingress_requests_total[5m])) > 0.01"
        ),
        wait="5m",
        severity="critical",
        summary="{{ $value | humanizePercentage }} of the requests to {{ $labels.app }} fail",
    ),
    Alert(
        name="SluiceRequestsRefused",
        expr=(
            'sum by (app, model) (rate(sluice_ingress_requests_total{outcome="busy"}[5m]))'
            " / sum by (app, model) (rate(sluice_ingress_requests_total[5m])) > 0.05"
        ),
        wait="5m",
        severity="warning",
        summary="{{ $value | humanizePercentage }} of the requests to {{ $labels.app }} are answered 429",
    ),
    Alert(
        name="SluiceEventStreamDead",
        expr="sluice_router_event_stream_alive == 0",
        wait="1m",
        severity="warning",
        summary=f"{_WHO} does not know what {{{{ $labels.peer }}}} caches, and routes without it",
    ),
    Alert(
        name="SluiceTransferSlow",
        expr=(
            "sluice_transfer_warm_rate_bytes_per_second < on (app, model, transport) group_left ()"
            " 0.25 * max by (app, model, transport) (sluice_transfer_warm_rate_bytes_per_second)"
        ),
        wait="10m",
        severity="warning",
        summary=f"{_WHO} reads from {{{{ $labels.peer }}}} at {{{{ $value | humanize }}}}B/s, under a quarter of the "
        "best pair over {{ $labels.transport }}: as when UCX fell back to TCP",
    ),
    Alert(
        name="SluiceQuarantineGrows",
        expr='delta(sluice_kv_blocks{state="quarantined"}[10m]) > 0 and sluice_kv_blocks{state="quarantined"} > 0',
        wait="10m",
        severity="warning",
        summary=f"blocks of {_WHO} go into quarantine faster than they leave it: reads do not complete",
    ),
    Alert(
        name="SluiceGuessesFail",
        expr=(
            "1 + sum by (app, model) (rate(sluice_engine_accepted_draft_tokens_total[10m]))"
            " / sum by (app, model) (rate(sluice_engine_drafted_rows_total[10m])) < 1.2"
            " and sum by (app, model) (rate(sluice_engine_drafted_rows_total[10m])) > 0.1"
        ),
        wait="10m",
        severity="warning",
        summary="the acceptance length of {{ $labels.app }} is {{ $value | humanize }}: what is guessed is wrong, and "
        "checking it costs time",
    ),
)


def text() -> str:
    rules = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.wait,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "runbook_url": f"{RUNBOOK}#{alert.anchor}"},
        }
        for alert in ALERTS
    ]
    return yaml.safe_dump({"groups": [{"name": "sluice", "rules": rules}]}, sort_keys=False, width=1000)

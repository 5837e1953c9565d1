"""Each alert fires on what it is for, and is silent otherwise: told by promtool, in Prometheus's own rule engine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from helm.alerts import ALERTS
from helm.readme import CHART
from tests.support import chart

ROOT = Path(__file__).parents[2]
PROMTOOL = shutil.which("promtool", path=f"{ROOT / '.cache/prometheus/usr/bin'}:/usr/local/bin:/usr/bin")
NEEDS_PROMTOOL = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool")

WORKER = 'app="sluice",model="m",name="decode-0",role="decode",incarnation="i"'
INGRESS = 'app="sluice",model="m",name="ingress-1",role="ingress",incarnation="i"'
CONTROLLER = 'app="sluice",model="m",name="controller",role="controller",incarnation="i"'
BUSY = f'sluice_ingress_requests_total{{{INGRESS},outcome="busy"}}'
OK = f'sluice_ingress_requests_total{{{INGRESS},outcome="ok"}}'
FAILED = f'sluice_ingress_requests_total{{{INGRESS},outcome="failed"}}'
RUNNING = f"sluice_engine_running_sequences{{{WORKER}}}"
STEPS = f"sluice_engine_step_seconds_count{{{WORKER}}}"
ALIVE = f'sluice_router_event_stream_alive{{{INGRESS},peer="decode-0"}}'
READY = f'sluice_cluster_workers{{{CONTROLLER},pool="decode",state="ready"}}'
STARTING = f'sluice_cluster_workers{{{CONTROLLER},pool="decode",state="starting"}}'
FAST = f'sluice_transfer_warm_rate_bytes_per_second{{{WORKER},peer="prefill-0",transport="nixl"}}'
SLOW = f'sluice_transfer_warm_rate_bytes_per_second{{{WORKER},peer="prefill-1",transport="nixl"}}'
OTHER = f'sluice_transfer_warm_rate_bytes_per_second{{{WORKER},peer="prefill-2",transport="ipc"}}'
ACCEPTED = f"sluice_engine_accepted_draft_tokens_total{{{WORKER}}}"
GUESSED = f"sluice_engine_drafted_rows_total{{{WORKER}}}"
QUARANTINED = f'sluice_kv_blocks{{{WORKER},group="self",state="quarantined"}}'

# Alert -> series of one value a minute: first those on which it fires, then those on which it does not.
CASES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "SluiceNoProgress": ({RUNNING: "3x40", STEPS: "100x40"}, {RUNNING: "3x40", STEPS: "100+60x40"}),
    "SluicePoolEmpty": ({READY: "0x40"}, {READY: "1x40"}),
    "SluicePoolBelowSize": ({STARTING: "1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1x20"}, {STARTING: "1 1 1 0x38"}),
    "SluiceRequestsFail": ({OK: "0+50x40", FAILED: "0+10x40"}, {OK: "0+9999x40", FAILED: "0+1x40"}),
    "SluiceRequestsRefused": ({OK: "0+50x40", BUSY: "0+10x40"}, {OK: "0+50x40", BUSY: "0+1x40"}),
    "SluiceEventStreamDead": ({ALIVE: "0x40"}, {ALIVE: "1x40"}),
    "SluiceTransferSlow": (
        {FAST: "50e9x40", SLOW: "2e9x40"},
        {FAST: "50e9x40", SLOW: "30e9x40", OTHER: "300e9x40"},
    ),
    "SluiceQuarantineGrows": ({QUARANTINED: "0+2x40"}, {QUARANTINED: "0 8 8 8 8 8 8 8 0x32"}),
    "SluiceGuessesFail": ({ACCEPTED: "0+5x40", GUESSED: "0+60x40"}, {ACCEPTED: "0+90x40", GUESSED: "0+60x40"}),
}


def promtool(*args: str | Path, cwd: Path) -> str:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *map(str, args)], cwd=cwd, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rule_test(name: str, series: dict[str, str], number: int) -> dict[str, object]:
    """The group of alerts after half an hour; `number` of them fire. promtool compares their labels too."""
    labels: dict[str, str] = {}
    alert = next(alert for alert in ALERTS if alert.name == name)
    if number:
        (*_, fired) = series
        labels = dict(pair.split("=", 1) for pair in fired.partition("{")[2].rstrip("}").replace('"', "").split(","))
        if "sum by" in alert.expr:
            labels = {key: labels[key] for key in ("app", "model", "pool") if key in labels}
        labels["severity"] = alert.severity
    values = [{"series": each, "values": _spelt(value)} for each, value in series.items()]
    return {
        "interval": "1m",
        "input_series": values,
        "alert_rule_test": [
            {"eval_time": "30m", "alertname": name, "exp_alerts": [{"exp_labels": labels}] if number else []}
        ],
    }


def _spelt(values: str) -> str:
    """promtool writes a constant as a+0xN."""
    *before, last = values.split()
    return " ".join([*before, last if "+" in last else last.replace("x", "+0x")])


def test_every_alert_has_its_case_and_a_page() -> None:
    assert [alert.name for alert in ALERTS] == list(CASES)
    (rule,) = chart.of_kind(chart.render(chart.recipe("multi-node")), "PrometheusRule")
    (group,) = rule["spec"]["groups"]
    urls = {each["alert"]: each["annotations"]["runbook_url"] for each in group["rules"]}
    base = chart.defaults()["monitoring"]["rules"]["runbookUrl"]
    assert urls == {alert.name: f"{base}#{alert.anchor}" for alert in ALERTS}
    assert rule["spec"] == yaml.safe_load((CHART / "files" / "rules.yaml").read_text().replace("RUNBOOK_URL", base))


@NEEDS_PROMTOOL
def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    shutil.copy(CHART / "files" / "rules.yaml", tmp_path)
    # What annotations say is not compared: rules without them.
    rules = yaml.safe_load((tmp_path / "rules.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        del rule["annotations"]
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(rules))
    tests = [
        rule_test(name, series[not fires], int(fires)) for name, series in CASES.items() for fires in (True, False)
    ]
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump({"rule_files": ["bare.yaml"], "tests": tests}))
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool("check", "rules", "rules.yaml", cwd=tmp_path)
    assert "SUCCESS" in promtool("test", "rules", "tests.yaml", cwd=tmp_path)


def test_every_alert_has_its_paragraph() -> None:
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "kubernetes.md").read_text(), re.MULTILINE)
    assert headings == [alert.name for alert in ALERTS]
    assert chart.defaults()["monitoring"]["rules"]["runbookUrl"].endswith("/docs/kubernetes.md")

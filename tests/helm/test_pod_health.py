"""What Kubernetes asks of a pod, asked as it does: of real processes' metrics, by the exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from cluster.config import WordsConfig
from cluster.exporter import Exporter
from cluster.metrics import Metrics
from helm.readme import CHART

SCRIPT = CHART / "files" / "pod_health.py"
RAYLET = "/api/local_raylet_healthz"
PORTS = WordsConfig(port_min=20940, port_max=20959)
RANGE = f"{PORTS.port_min}-{PORTS.port_max}"


@dataclass
class Pod:
    """A worker that tells metrics, something that answers as the raylet and the public port do, and a fake `ray`."""

    metrics: Metrics
    home: Path
    healthy: dict[str, bool]
    port: int  # of the raylet and of the public

    def ask(self, *args: str) -> tuple[int, str]:
        path = f"{self.home}:{os.environ['PATH']}"
        environment = {"PATH": path, "TMPDIR": str(self.home)}
        command = [sys.executable, "-S", str(SCRIPT), "--raylet-port", str(self.port), *args]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=60)
        return done.returncode, done.stderr.strip()


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    healthy = {RAYLET: True, "/health": True}

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if healthy.get(self.path) else 503)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    metrics = Metrics()
    exporter = Exporter(metrics, PORTS)
    exporter.start()
    ray = tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    ray.chmod(0o755)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield Pod(metrics, tmp_path, healthy, server.server_port)
        server.shutdown()
    exporter.stop()


def test_a_pod_is_ready_when_a_request_could_be_served(pod: Pod) -> None:
    ready = ("ready", "--public-port", str(pod.port))
    assert pod.ask(*ready) == (0, "")
    pod.healthy["/health"] = False
    assert pod.ask(*ready) == (1, "a request could not be served now")
    pod.healthy[RAYLET] = False
    assert pod.ask(*ready) == (1, "the raylet does not answer")
    assert pod.ask("live") == (1, "the raylet does not answer")


def test_a_pod_lives_while_its_workers_step(pod: Pod) -> None:
    live = ("live", "--ports", RANGE, "--stalled-s", "0")
    assert pod.ask(*live) == (0, ""), "there is no work"
    pod.metrics.running.set(2)
    assert pod.ask(*live) == (0, ""), "seen for the first time"
    pod.metrics.step.observe(0.01)
    assert pod.ask(*live) == (0, ""), "it stepped"
    status, said = pod.ask(*live)
    assert status == 1 and said.endswith(f"{PORTS.port_min} has work and has not stepped for 0 s")
    assert pod.ask(*live[:-1], "3600") == (0, ""), "not yet for so long"
    pod.metrics.running.set(0)
    assert pod.ask(*live) == (0, ""), "it has no work any more"
    assert pod.ask("live", "--head") == (1, "the GCS does not answer")


def test_a_pod_that_goes_is_drained_and_waits_until_its_workers_are_gone_and_it_is_idle(pod: Pod) -> None:
    drain = ("drain", "--ports", RANGE, "--deadline-s")
    assert pod.ask(*drain, "60") == (0, "")
    asked = (pod.home / "asked").read_text()
    assert asked.startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION")
    assert asked.endswith("--deadline-remaining-seconds 60\n")
    pod.metrics.leases.set(1)
    status, said = pod.ask(*drain, "0.1")
    assert status == 1 and said.endswith(f"still busy: 127.0.0.1:{PORTS.port_min}")
    pod.metrics.leases.set(0)
    pod.metrics.set_blocks("self", {"free": 8})
    status, said = pod.ask(*drain, "0.1")
    assert status == 1 and said.endswith(f"still there: 127.0.0.1:{PORTS.port_min}"), "a worker, idle or not"
    (pod.home / "ray").write_text("#!/bin/sh\necho no such node; exit 3\n")
    assert pod.ask(*drain, "60") == (0, "Ray did not drain the node: no such node")


@pytest.mark.parametrize("ports", ["20000", "a-b", "-"])
def test_ports_that_are_no_range_are_refused(pod: Pod, ports: str) -> None:
    status, said = pod.ask("drain", "--deadline-s", "1", f"--ports={ports}")
    assert status == 2 and f"'{ports}' is no range of ports; write MIN-MAX" in said

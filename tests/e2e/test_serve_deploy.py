"""`deploy.app:build` as RayService and `serve deploy` use it: a config file, sent to a running cluster."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from deploy import life
from deploy.local_cluster import LocalCluster
from tests.support.checkpoints import checkpoint
from tests.support.ray_cluster import until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(180)]


def test_serve_deploy_brings_the_app_up_and_removal_takes_its_workers(tmp_path: Path) -> None:
    cluster = LocalCluster.start(8, "SLUICE_CLUSTER_SECRET", dashboard=True)
    try:
        port = cluster.ports.base + 4
        config = {
            "model": {"path": str(checkpoint("llama")), "served_name": "model"},
            "kv": {"num_blocks": 64, "block_size": 16},
            "http": {"replicas": 2},
        }
        app = {
            "name": "sluice",
            "route_prefix": "/",
            "import_path": "deploy.app:build",
            "args": {"config_inline": config},
        }
        file = tmp_path / "serve.yaml"
        file.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1", "port": port}, "applications": [app]}))
        serve = Path(sys.executable).with_name("serve")
        address = f"http://127.0.0.1:{cluster.dashboard_port}"
        environment = {**os.environ, "RAY_AUTH_MODE": "token"}
        subprocess.run([str(serve), "deploy", "-a", address, str(file)], check=True, timeout=60, env=environment)

        def healthy() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code == 200
            except httpx.HTTPError:
                return False

        asyncio.run(until(healthy, "healthy", 90))
        body = {"model": "model", "prompt": list(range(3, 60)), "max_tokens": 8, "return_route": True}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["sluice"]["plan"] == "disaggregated"
        assert _workers(cluster)
        life.remove("sluice", 30)
        asyncio.run(until(lambda: not _workers(cluster), "every worker is gone", 30))
    finally:
        cluster.stop()


def _workers(cluster: LocalCluster) -> list[str]:
    commands = (" ".join(process.cmdline()) for process in cluster.processes())
    return [command for command in commands if "WorkerActor" in command]

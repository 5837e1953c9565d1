"""`deploy.app:build` as RayService and `serve deploy` use it: config files, sent to a running cluster."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from cluster.membership import Member, Membership
from deploy import life
from deploy.local_cluster import LocalCluster
from tests.support.checkpoints import checkpoint
from tests.support.ray_cluster import until
from tests.support.steady_load import Load

pytestmark = [pytest.mark.full, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

APP = "sluice"


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    cluster = LocalCluster.start(10, "SLUICE_CLUSTER_SECRET", dashboard=True)
    try:
        yield cluster
    finally:
        cluster.stop()


def test_an_app_comes_up_takes_another_pool_size_under_load_and_goes(cluster: LocalCluster, tmp_path: Path) -> None:
    port = cluster.ports.base + 4
    url = f"http://127.0.0.1:{port}"

    def deploy(num_decode: int) -> None:
        config = {
            "model": {"path": str(checkpoint("llama")), "served_name": "model"},
            "kv": {"num_blocks": 128, "block_size": 8},
            "pools": {"prefill": {"workers": 1}, "decode": {"workers": num_decode}},
            "http": {"replicas": 2},
        }
        app = {
            "name": APP, "route_prefix": "/", "import_path": "deploy.app:build", "args": {"config_inline": config},
        }  # fmt: skip
        file = tmp_path / "serve.yaml"
        file.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1", "port": port}, "applications": [app]}))
        serve = Path(sys.executable).with_name("serve")
        address = f"http://127.0.0.1:{cluster.dashboard_port}"
        environment = {**os.environ, "RAY_AUTH_MODE": "token"}
        subprocess.run([str(serve), "deploy", "-a", address, str(file)], check=True, timeout=60, env=environment)

    def healthy() -> bool:
        try:
            return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    deploy(1)
    asyncio.run(until(healthy, "healthy", 90))
    before = _members()
    assert before.keys() == {"decode-0", "prefill-0"}
    with Load(url) as load:
        load.wait_for(3)
        deploy(2)
        asyncio.run(until(lambda: _members().keys() == {*before, "decode-1"}, "the pool has grown", 60))
        assert {name: _members()[name].incarnation for name in before} == _incarnations(before)
        load.wait_for(10)
        deploy(1)
        asyncio.run(until(lambda: _incarnations(_members()) == _incarnations(before), "the pool has shrunk", 60))
        load.wait_for(10)
    body = {"model": "model", "prompt": list(range(3, 60)), "max_tokens": 8, "return_route": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["sluice"]["plan"] == "disaggregated"
    assert len(_workers(cluster)) == 2
    life.remove(APP, 30)
    asyncio.run(until(lambda: not _workers(cluster), "every worker is gone", 30))


def _members() -> dict[str, Member]:
    return {member.name: member for member in Membership.from_wire(life.status(APP).membership).members}


def _incarnations(members: dict[str, Member]) -> dict[str, str]:
    return {name: member.incarnation for name, member in members.items()}


def _workers(cluster: LocalCluster) -> list[str]:
    commands = (" ".join(process.cmdline()) for process in cluster.processes())
    return [command for command in commands if "WorkerActor" in command]

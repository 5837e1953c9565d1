"""A RayService without Kubernetes: its pods as namespaces, its serveConfigV2 by `serve deploy`, another image tag.

What KubeRay does is done by hand, in its order: pods, deployment, readiness, for another image a second cluster beside
the first, traffic to the second once it is ready, the drained end of the first.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support import chart
from tests.support.checkpoints import checkpoint
from tests.support.hosts import Host, hosts
from tests.support.pods import MODEL, Pod, PodCluster, pod_cluster
from tests.support.ray_cluster import until
from tests.support.revision import another_revision
from tests.support.steady_load import Load

pytestmark = [
    pytest.mark.full, pytest.mark.cluster, pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(900)
]  # fmt: skip

READY_S = 240.0
_MEMBERS = """
import json, ray
from cluster.membership import Membership
from deploy import life
ray.init(address="auto", namespace="sluice", log_to_driver=False)
members = Membership.from_wire(life.status("sluice").membership).members
print(json.dumps([[m.name, m.incarnation, m.compatibility_hash.hex(), m.address] for m in members]))
"""


def values(tag: str) -> dict[str, Any]:
    """The recipe for CPUs with a pool for each stage."""
    recipe = chart.recipe("cpu")
    recipe["config"] = {
        **recipe["config"],
        "model": {"served_name": "model"},
        "kv": {"num_blocks": 128, "block_size": 8},
        "router": {"local_prefill": "never"},
        "transfer": {"ucx_tls": "tcp,self"},  # two namespaces share the memory that UCX would find
        "words": {"heartbeat_timeout_s": 20.0, "step_timeout_s": 60.0},  # a busy machine is no failure here
    }
    # Two cores each: one pod has no room for both.
    recipe["pools"] = {"prefill": {"config": {"cpus": 2}}, "decode": {"config": {"cpus": 2}}}
    recipe["model"] = {**recipe["model"], "path": MODEL}
    return {**recipe, "image": {"tag": tag}}


@pytest.fixture(scope="module")
def seven() -> Iterator[list[Host]]:
    with hosts(7) as made:
        yield made


def wait(holds: Callable[[], bool], what: str) -> None:
    asyncio.run(until(holds, what, READY_S))


def bring_up(cluster: PodCluster) -> None:
    """Until Kubernetes would send traffic to each of its worker pods."""
    wait(lambda: not cluster.head.probe("livenessProbe"), f"the head lives\n{cluster.logs()}")
    cluster.deploy()
    for pod in cluster.workers:
        wait(lambda pod=pod: not pod.probe("readinessProbe"), f"{pod.name} is ready")
        assert pod.probe("livenessProbe") == ""


def both_serve(cluster: PodCluster) -> bool:
    """Two replicas. Pods with one are ready, others are not: where a replica that moves starts is Serve's choice."""
    counts = [num_replicas(pod) for pod in cluster.workers]
    ready = [not pod.probe("readinessProbe") for pod in cluster.workers]
    return sum(counts) == 2 and ready == [count > 0 for count in counts]


def num_replicas(pod: Pod) -> int:
    found = 0
    for process in pod.main.children(recursive=True):
        try:
            found += "ServeReplica" in " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
    return found


def drained_node(cluster: PodCluster, spare: Host) -> None:
    """A pod with a decode worker is told to go under load, and another one is there: its worker moves."""
    (before,) = [address for name, *_, address in members(cluster) if name == "decode-0"]
    (leaving,) = [
        pod for pod in cluster.workers if before.startswith(f"{pod.address}:")
    ]  # either, as their shape is one
    (staying,) = [pod for pod in cluster.workers if pod is not leaving]
    (group,) = [
        each for each in chart.ray_service(cluster.rendered)["rayClusterConfig"]["workerGroupSpecs"]
        if leaving.name.startswith(f"{each['groupName']}-")
    ]  # fmt: skip
    successor = cluster.start(group, spare)
    wait(lambda: not successor.probe("startupProbe"), "another pod has joined")
    with Load(f"http://{staying.address}:8000") as load:
        load.wait_for(3)
        assert leaving.stop() == "", "Ray took the node out, and it became idle"
        load.wait_for(6)
    cluster.pods.remove(leaving)
    (after,) = [address for name, *_, address in members(cluster) if name == "decode-0"]
    assert after.startswith(f"{successor.address}:")
    wait(lambda: both_serve(cluster), "both replicas serve")


def members(cluster: PodCluster) -> list[list[str]]:
    """name, incarnation, compatibility hash, address of each."""
    done = cluster.head.run(["python", "-c", _MEMBERS])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def url(cluster: PodCluster) -> str:
    """The Service has every ready pod behind it; this is one of them."""
    return f"http://{next(filter(num_replicas, cluster.workers)).address}:8000"


def test_a_rayservice_serves_lets_a_node_go_takes_another_image_and_is_deleted(
    seven: list[Host], tmp_path: Path
) -> None:
    first, second = chart.render(values("0.1.0")), chart.render(values("0.2.0"))
    assert chart.serve_config(first) == chart.serve_config(second)
    assert chart.pod_templates(first) != chart.pod_templates(second), "so KubeRay makes a second cluster"
    for name in ("links", "first", "second"):
        (tmp_path / name).mkdir()
    # Whole files: where they lie is not seen inside a pod.
    other = Path(shutil.copytree(another_revision(checkpoint("llama"), tmp_path / "links"), tmp_path / "other"))

    with pod_cluster(first, seven[:3], checkpoint("llama"), tmp_path / "first") as old:
        bring_up(old)
        before = members(old)
        assert [name for name, *_ in before] == ["decode-0", "prefill-0"]
        assert len({address.rpartition(":")[0] for *_, address in before}) == 2, "one in each pod"
        for pod in old.workers:
            body = {"model": "model", "prompt": list(range(3, 60)), "max_tokens": 8, "return_route": True}
            answer = httpx.post(f"http://{pod.address}:8000/v1/completions", json=body, timeout=60, trust_env=False)
            assert answer.status_code == 200, answer.text
            route = answer.json()["usage"]["sluice"]
            assert (route["plan"], route["transport"]) == ("disaggregated", "nixl")
        drained_node(old, seven[3])

        with pod_cluster(second, seven[4:], other, tmp_path / "second") as new:
            with Load(url(old)) as load:
                load.wait_for(3)
                bring_up(new)
                load.wait_for(3)
                load.url = url(new)
                load.wait_for(6)  # what was asked at the old pods has ended, or is being drained
                said = [pod.stop() for pod in old.workers]
                load.wait_for(6)
            assert not load.failures
            assert said == ["", ""], "Ray took the nodes out, and they became idle"
            old.head.kill()
            after = members(new)
            assert [name for name, *_ in after] == ["decode-0", "prefill-0"]
            hashes = [{hash_ for *_, hash_, _ in each} for each in (before, after)]
            assert len(hashes[0]) == len(hashes[1]) == 1 and hashes[0] != hashes[1]
            ends = [pod.stop() for pod in new.workers]
            assert ends == ["", ""]
    left = [pod.name for cluster in (old, new) for pod in cluster.pods if pod.process.poll() is None]
    assert left == []

"""Pods of a rendered RayService without Kubernetes: each in namespaces of its own (network, mounts, processes), with
the command, the environment and the probes that the chart renders. Needs root.

What a container engine would add is not there: the image, its user, limits of memory and cores. A `/tmp` of its own and
a `/dev/shm` of its own are; in `/tmp/model` lies what the volume would hold.
"""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from helm.readme import CHART
from tests.support import chart
from tests.support.chart import Object
from tests.support.hosts import Host

ROOT = Path(__file__).parents[2]
MODEL = "/tmp/model"  # where a pod sees its checkpoint
GONE_S = 60.0
_BIN = Path(sys.executable).parent
_PROBE = "/etc/sluice-pod/pod_health.py"
# $1: the directory that becomes /tmp, $2: the checkpoint, $3: a pipe that hears when all that is there; then the
# command.
_INSIDE = """
set -e
mkdir -p "$1/model"
mount --bind "$2" "$1/model"
mount --rbind "$1" /tmp
mount -t tmpfs -o size=2g tmpfs /dev/shm
echo inside >&"$3"
shift 3
exec "$@"
"""


@dataclass(frozen=True, slots=True)
class Pod:
    """`process` is what entered the namespaces; `main` the first process inside."""

    name: str
    host: Host
    container: Object
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def address(self) -> str:
        return self.host.address

    @property
    def main(self) -> psutil.Process:
        """Number 1 inside."""
        deepest = psutil.Process(self.process.pid)
        while deepest.name() in ("ip", "unshare"):
            (deepest,) = deepest.children()
        return deepest

    def run(self, command: list[str], timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """As `kubectl exec`."""
        inside = ["nsenter", "-t", str(self.main.pid), "-n", "-m", "-p", "--", *command]
        return subprocess.run(
            inside, check=False, capture_output=True, text=True, timeout=timeout_s, env=dict(self.environment), cwd=ROOT
        )

    def probe(self, which: str) -> str:
        """What is wrong, by the rendered probe; empty: nothing."""
        done = self.run(_found(self.container[which]["exec"]["command"]))
        return "" if done.returncode == 0 else done.stderr.strip() or f"status {done.returncode}"

    def stop(self) -> str:
        """What the kubelet does: the rendered preStop hook, SIGTERM, and in the end SIGKILL; what the hook said."""
        said = ""
        if "lifecycle" in self.container:
            hook = _found(self.container["lifecycle"]["preStop"]["exec"]["command"])
            said = self.run(hook, timeout_s=float(hook[-1]) + 30).stderr.strip()
        try:
            self.main.send_signal(signal.SIGTERM)
            self.process.wait(GONE_S)
        except (psutil.NoSuchProcess, subprocess.TimeoutExpired):
            self.kill()
        return said

    def kill(self) -> None:
        """With all that runs inside: number 1 takes the rest along."""
        try:
            self.main.kill()
        except (psutil.NoSuchProcess, ValueError):
            pass
        self.process.kill()
        self.process.wait(GONE_S)


@dataclass(frozen=True, slots=True)
class PodCluster:
    """One RayCluster of a RayService. The head is the first pod."""

    rendered: list[Object]
    token: str
    model: Path
    directory: Path
    pods: list[Pod] = field(default_factory=list)

    @property
    def head(self) -> Pod:
        return self.pods[0]

    @property
    def workers(self) -> list[Pod]:
        return self.pods[1:]

    def start(self, group: Object, host: Host) -> Pod:
        """The head, or another pod of a worker group."""
        head = self.head.address if self.pods else host.address
        name = f"{group.get('groupName', 'head')}-{len(self.pods)}"
        pod = _start(self, name, group, host, head)
        self.pods.append(pod)
        return pod

    def deploy(self) -> None:
        """serveConfigV2, as the operator sends it: over the network, to the head."""
        file = self.directory / "serve.yaml"
        file.write_text(chart.ray_service(self.rendered)["serveConfigV2"])
        command = [str(_BIN / "serve"), "deploy", "-a", f"http://{self.head.address}:8265", str(file)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=dict(self.head.environment))
        assert done.returncode == 0, done.stdout + done.stderr

    def logs(self) -> str:
        return "\n".join(f"== {pod.name}\n{pod.log.read_text()[-3000:]}" for pod in self.pods)


@contextmanager
def pod_cluster(rendered: list[Object], hosts: list[Host], model: Path, directory: Path) -> Iterator[PodCluster]:
    """A head and one pod for each worker group, in that order, each on a host of its own."""
    cluster = chart.ray_service(rendered)["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len(groups) == len(hosts)
    started = PodCluster(rendered, secrets.token_hex(32), model, directory)
    try:
        for group, host in zip(groups, hosts, strict=True):
            started.start(group, host)
        yield started
    finally:
        for pod in started.pods:
            pod.kill()


def _start(cluster: PodCluster, name: str, group: Object, host: Host, head: str) -> Pod:
    (container,) = group["template"]["spec"]["containers"]
    gateway = f"{host.address.rpartition('.')[0]}.1"
    subprocess.run(["ip", "-n", host.namespace, "route", "replace", "default", "via", gateway], check=True)
    environment = {
        "PATH": f"{_BIN}:{os.environ['PATH']}",
        "HOME": "/tmp",
        "PYTHONPATH": str(ROOT),  # as the image says
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",  # as the operator adds
        "RAY_AUTH_TOKEN": cluster.token,
        **{each["name"]: _value(each, cluster.rendered) for each in container["env"]},
    }
    address = ["--head"] if head == host.address else [f"--address={head}:6379"]
    parameters = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
    home = cluster.directory / name
    home.mkdir()
    log = cluster.directory / f"{name}.log"
    waiting, inside = os.pipe()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *("ip", "netns", "exec", host.namespace, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("bash", "-c", _INSIDE, "pod", str(home), str(cluster.model), str(inside)),
                *("ray", "start", *address, *parameters, "--block"),
            ],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(inside,),
        )
    os.close(inside)
    with os.fdopen(waiting) as pipe:
        assert pipe.readline() == "inside\n", log.read_text()
    return Pod(name, host, container, environment, process, log)


def _value(variable: Object, rendered: list[Object]) -> str:
    if "value" in variable:
        return variable["value"]
    wanted = variable["valueFrom"]["secretKeyRef"]
    (secret,) = [each for each in chart.of_kind(rendered, "Secret") if each["metadata"]["name"] == wanted["name"]]
    if wanted["key"] in secret.get("stringData", {}):
        return secret["stringData"][wanted["key"]]
    return base64.b64decode(secret["data"][wanted["key"]]).decode()


def _found(command: list[str]) -> list[str]:
    """The script lies in a ConfigMap there, in the chart here; python3 is the one of the tests."""
    assert command[:2] == ["python3", _PROBE] and shutil.which("nsenter")
    return [sys.executable, str(CHART / "files" / "pod_health.py"), *command[2:]]

"""The RUN steps of deploy/Dockerfile, run without a container engine in a clean root of Debian.

The base image is not there: the root has Debian's own Python 3.11 in its place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.helm.test_image import ROOT, STAGES

pytestmark = [pytest.mark.full, pytest.mark.slow, pytest.mark.netns, pytest.mark.timeout(1800)]

RELEASE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
# Steps that are not run here, and why.
NOT_RUN = {
    "build-cpu": "2 GB of packages; test_image resolves every one of them with pip, and installs none",
    "build-cuda": "several GB of kernels that only a GPU can start; their names and pins are compared as text",
}
_UNPACKED = ROOT / ".cache" / "debootstrap"
# $1: the root; then the command.
_INSIDE = """
set -e
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
exec chroot "$@"
"""


def run_steps(stage: str) -> list[str]:
    return STAGES[stage].of("RUN")


def done(command: Sequence[str], **options: object) -> str:
    """Its output; fails with all that it said."""
    ended = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert ended.returncode == 0, ended.stdout[-5000:]
    return ended.stdout


class CleanRoot:
    """A Debian of its own. What runs inside sees its own processes, and leaves no mount behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, script: str) -> str:
        """`sh -c`, as a RUN step is."""
        return done(
            [
                *("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _INSIDE, "root", str(self.path)),
                *("/usr/bin/env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-c", script),
            ]
        )


def debootstrap() -> Path | None:
    """Debian's own tool, unpacked under .cache: it is a script and need not be installed."""
    tool = _UNPACKED / "usr" / "sbin" / "debootstrap"
    if not tool.exists() and shutil.which("apt-get") and shutil.which("dpkg-deb"):
        _UNPACKED.mkdir(parents=True, exist_ok=True)
        fetched = subprocess.run(["apt-get", "download", "-qq", "debootstrap"], cwd=_UNPACKED, check=False)
        for package in _UNPACKED.glob("debootstrap_*.deb"):
            if fetched.returncode == 0:
                subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=_UNPACKED, check=True)
            package.unlink()
    return tool if tool.exists() else None


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CleanRoot]:
    tool = debootstrap()
    if tool is None:
        pytest.skip("needs root and iproute2, and Debian's debootstrap")
    path = tmp_path_factory.mktemp("root")
    environment = {**os.environ, "DEBOOTSTRAP_DIR": str(_UNPACKED / "usr" / "share" / "debootstrap")}
    done(
        ["unshare", "--mount", str(tool), "--variant=minbase", "--include=python3", RELEASE, str(path), MIRROR],
        env=environment,
    )
    shutil.copy("/etc/resolv.conf", path / "etc" / "resolv.conf")
    yield CleanRoot(path)
    shutil.rmtree(path)


def test_every_step_is_run_or_said_not_to_be() -> None:
    with_steps = {name for name, stage in STAGES.items() if stage.of("RUN")}
    assert with_steps == {"application", "cuda", *NOT_RUN}


def test_the_user_is_made_and_the_libraries_for_rdma_are_installed(root: CleanRoot) -> None:
    for step in run_steps("application"):
        root.run(step)
    assert root.run("id -u sluice; id -g sluice").split() == ["1000", "1000"]
    for step in run_steps("cuda"):
        root.run(step)
    assert "librdmacm.so.1" in root.run("ldconfig -p")
    assert list((root.path / "var" / "lib" / "apt" / "lists").iterdir()) == []

"""Two hosts on one machine: network namespaces joined by a bridge, and workers that live in them. Needs root."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from cluster.config import SluiceConfig
from tests.support import plain_cluster
from tests.support.plain_cluster import WorkerMain

_CLONE_NEWNS = 0x00020000
_CLONE_NEWNET = 0x40000000
_MS_REC_SLAVE = 0x4000 | 0x80000
_MNT_DETACH = 2


@dataclass(frozen=True, slots=True)
class Host:
    namespace: str
    address: str
    cable: str  # the interface at our end

    def unplug(self) -> None:
        """From now on every packet to and from it is lost, without a word."""
        _ip("link", "set", self.cable, "down")

    def plug(self) -> None:
        _ip("link", "set", self.cable, "up")


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Each with an address of its own on one network; this process is on it, too."""
    tag = f"sl{os.getpid() % 100_000}"
    net = f"10.213.{os.getpid() % 250}"
    bridge = f"{tag}br"
    made = [Host(f"{tag}h{index}", f"{net}.{index + 2}", f"{tag}c{index}") for index in range(count)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{net}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for host in made:
            _ip("netns", "add", host.namespace)
            _ip("link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("link", "set", host.cable, "master", bridge, "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        yield made
    finally:
        for host in made:
            for remove in (("link", "del", host.cable), ("netns", "del", host.namespace)):
                with suppress(subprocess.CalledProcessError):
                    _ip(*remove)
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", bridge)


def serve_on(places: Mapping[str, Host], main: WorkerMain = plain_cluster.serve) -> WorkerMain:
    """Workers live on the host that their name is mapped to."""
    return partial(_serve, dict(places), main)


def _serve(
    places: dict[str, Host], main: WorkerMain, config: SluiceConfig, pool: str, name: str, pipe: Connection
) -> None:
    host = places[name]
    _enter(host.namespace)
    words = config.words.model_copy(update={"host": "0.0.0.0"})  # as in a pod: what is announced is the cable's address
    main(config.model_copy(update={"words": words}), pool, name, pipe)


def _enter(namespace: str) -> None:
    """What `ip netns exec` does: this thread, and those it starts, get the namespace and a /sys that shows it."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")

    with Path("/run/netns", namespace).open() as file:
        check(libc.setns(file.fileno(), _CLONE_NEWNET))
    check(libc.unshare(_CLONE_NEWNS))
    check(libc.mount(b"", b"/", b"none", _MS_REC_SLAVE, None))
    libc.umount2(b"/sys", _MNT_DETACH)
    check(libc.mount(namespace.encode(), b"/sys", b"sysfs", 0, None))


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True)

"""A Ray cluster of our own, on a machine that is too busy for Ray."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest
import ray

from deploy.local_cluster import LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.full]


@contextmanager
def the_first_stands_still(name: str) -> Iterator[list[int]]:
    """Stops the first process called `name` that this one starts from now on; its pid, once seen."""
    this = psutil.Process()
    before = {process.pid for process in this.children(recursive=True)}
    over, seen = threading.Event(), list[int]()

    def look() -> None:
        while not seen and not over.wait(0.005):
            for process in this.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if process.pid not in before and process.name() == name:
                        process.suspend()
                        seen.append(process.pid)
                        return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_a_start_that_ray_gives_up_is_made_again() -> None:
    with the_first_stands_still("raylet") as stopped:
        cluster = LocalCluster.start(2, "SLUICE_TEST_SECRET")
    try:
        assert len(stopped) == 1 and not psutil.pid_exists(stopped[0])
        assert ray.cluster_resources()["CPU"] == 2
        assert sum(process.name() == "raylet" for process in cluster.processes()) == 1
    finally:
        cluster.stop()
    assert cluster.processes() == [] and not cluster.directory.exists()

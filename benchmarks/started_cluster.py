"""A whole app on a Ray cluster of its own, in a process of its own: what a benchmark asks through its public port."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from benchmarks.process import process, receive
from benchmarks.report import progress
from cluster.config import SluiceConfig


@contextmanager
def started_cluster(config: SluiceConfig, label: str) -> Iterator[str]:
    """The URL of the public port; drained and gone afterwards. Raises EOFError when it does not start, having said why.

    `label` stands before its progress.
    """
    with process(_serve, config, label) as pipe:
        url = receive(pipe)
        try:
            yield url
        finally:
            pipe.send("stop")
            receive(pipe)  # a cluster whose driver is killed would live on


def _serve(pipe: Connection, config: SluiceConfig, label: str) -> None:
    from deploy.local_app import local_app

    told: list[str] = []

    def tell(line: str) -> None:
        if line not in told:
            told.append(line)
            progress(f"{label}: {line}")

    with local_app(config, tell) as app:
        pipe.send(app.url)
        pipe.recv()
    pipe.send("stopped")

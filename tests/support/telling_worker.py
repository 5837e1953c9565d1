"""A worker that says, each time it hears who is there, what it has had to do since the last time."""

from __future__ import annotations

from multiprocessing.connection import Connection

from cluster.config import SluiceConfig
from cluster.membership import Membership
from tests.support.plain_cluster import SECRET
from workers import standalone


def serve(config: SluiceConfig, pool: str, name: str, pipe: Connection) -> None:
    """In the worker's process."""
    worker = standalone.make_worker(config, pool, name, SECRET)
    pipe.send_bytes(Membership(1, (worker.start(),)).to_wire())
    try:
        while True:
            worker.update_members(Membership.from_wire(pipe.recv_bytes()))
            pipe.send(worker.load())
    except (EOFError, OSError):
        worker.stop()

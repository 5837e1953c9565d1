"""A worker that tells whose session broke once its engine thread has acted on it, and that hangs when it is told to."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import NamedTuple

from cluster.config import SluiceConfig
from cluster.errors import SessionError
from cluster.session import Session
from tests.support.plain_cluster import SECRET, run
from workers import standalone

HANG = signal.SIGUSR1  # the engine thread stops in the middle of its loop, as in a collective that never returns


class Broken(NamedTuple):
    incarnation: str  # of the peer
    at: float  # time.monotonic()
    reason: str


def serve(config: SluiceConfig, pool: str, name: str, pipe: Connection) -> None:
    """In the worker's process. `Broken` values go into the pipe."""
    worker = standalone.make_worker(config, pool, name, SECRET)
    heard = worker.on_broken

    def on_broken(session: Session, error: SessionError) -> None:
        heard(session, error)
        worker._post(partial(tell, session.peer.incarnation, str(error)))

    def tell(incarnation: str, reason: str) -> None:
        with suppress(OSError):  # at the end nobody listens
            pipe.send(Broken(incarnation, time.monotonic(), reason))

    worker.on_broken = on_broken
    signal.signal(HANG, lambda *_: worker._post(_hang))
    run(worker, pipe)


def _hang() -> None:
    threading.Event().wait()

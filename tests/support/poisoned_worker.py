"""A worker that dies, without a word, of hearing of one request. The product knows nothing of it."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection

from cluster.config import SluiceConfig
from cluster.protos import worker_pb2 as pb
from cluster.session import Session
from tests.support import plain_cluster
from workers import standalone
from workers.worker import Worker

POISON = "poisoned-request"


class MortalWorker(Worker):
    def on_frame(self, session: Session, frame: pb.Frame) -> None:
        if frame.submit.key.request_id == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        super().on_frame(session, frame)


def serve(config: SluiceConfig, pool: str, name: str, pipe: Connection) -> None:
    """In the worker's process."""
    standalone.Worker = MortalWorker
    plain_cluster.serve(config, pool, name, pipe)

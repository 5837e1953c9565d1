"""A worker of this process whose engine thread takes one turn of its loop when it is told to, and none otherwise.

Words and bytes have threads of their own, as always: what they bring waits in the inbox for the next turn.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.config import SluiceConfig
from cluster.errors import SessionError
from cluster.membership import Member, Membership
from cluster.protos import worker_pb2 as pb
from cluster.session import Session
from tests.support.plain_cluster import SECRET
from workers import standalone

DEADLINE_S = 20.0
POLL_S = 0.0005


class SteppedWorker:
    def __init__(self, config: SluiceConfig, pool: str) -> None:
        self.worker = standalone.make_worker(config, pool, f"{pool}-0", SECRET)
        self._permits, self._taken = threading.Semaphore(0), threading.Semaphore(0)
        self._bytes_move = threading.Event()
        self._bytes_move.set()
        turn = self.worker._turn

        def stepped() -> None:
            self._permits.acquire()
            turn()
            self._taken.release()

        self.worker._turn = stepped
        self._told: Counter[str] = Counter()
        self._awaited: Counter[str] = Counter()
        self._heard = threading.Condition()
        on_frame, on_broken = self.worker.on_frame, self.worker.on_broken

        def framed(session: Session, frame: pb.Frame) -> None:
            on_frame(session, frame)
            self._count(frame.WhichOneof("kind") or "")

        def broken(session: Session, error: SessionError) -> None:
            on_broken(session, error)
            self._count("broken")

        self.worker.on_frame, self.worker.on_broken = framed, broken
        self.member: Member = self.worker.start()
        for executor in self.worker._parts.executors:
            run_once = executor.run_once

            def held(run_once: Callable[[], bool] = run_once) -> bool:
                return run_once() if self._bytes_move.is_set() else True

            executor.run_once = held

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self._permits.release()
            assert self._taken.acquire(timeout=DEADLINE_S), "the turn does not end"

    def turn_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not holds():
            assert time.monotonic() < deadline, "not reached, turn after turn"
            self.turn()

    def forget(self) -> None:
        """What has come so far is not awaited."""
        self._awaited = Counter(self._told)

    def until_told(self, kind: str) -> None:
        """One more frame of this kind has come, or "broken": a session has gone. It waits for the next turn."""
        self._awaited[kind] += 1
        with self._heard:
            enough = self._heard.wait_for(lambda: self._told[kind] >= self._awaited[kind], DEADLINE_S)
        assert enough, f"{kind}: {self._told[kind]} came, {self._awaited[kind]} are awaited"

    def _count(self, kind: str) -> None:
        with self._heard:
            self._told[kind] += 1
            self._heard.notify_all()

    def hold_bytes(self) -> None:
        """Reads are asked for and not made."""
        self._bytes_move.clear()

    def let_bytes_move(self) -> None:
        self._bytes_move.set()

    @property
    def load(self) -> pb.LoadReport:
        return self.worker._load()

    def count(self, metric: str) -> float:
        return self.worker.metrics.value(metric)

    def stop(self) -> None:
        self.let_bytes_move()
        stopping = threading.Thread(target=self.worker.stop)
        stopping.start()
        while stopping.is_alive():
            self._permits.release()
            stopping.join(POLL_S)


@contextmanager
def stepped_pair(config: SluiceConfig) -> Iterator[tuple[SteppedWorker, SteppedWorker]]:
    """A prefill and a decode worker that can read from it."""
    prefill, decode = SteppedWorker(config, "prefill"), SteppedWorker(config, "decode")
    try:
        membership = Membership(1, (prefill.member, decode.member))
        for each in (prefill, decode):
            each.worker.update_members(membership)

        def warm() -> bool:
            prefill.turn()
            return any(pair.warm for pair in decode.load.pairs)

        decode.turn_until(warm)
        yield prefill, decode
    finally:
        prefill.stop()
        decode.stop()

"""Heartbeats, both ways: ours from a thread of their own, and what a peer's tell about its life.

A peer that is silent for too long is lost: the link is cut, the host is gone, the process is frozen. One that
beats but has not stepped although it has work is unhealthy: its engine hangs. Both end the session.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from threading import Event, Lock, Thread
from typing import Final, NamedTuple, Protocol

from cluster.protos import worker_pb2 as pb

DEFAULT_INTERVAL_S: Final = 0.25
DEFAULT_TIMEOUT_S: Final = 1.5
DEFAULT_STEP_TIMEOUT_S: Final = 5.0


class StepAge(NamedTuple):
    """How long ago the engine last stepped or ticked idle, and whether it has something to do."""

    seconds: float
    has_work: bool

    def stuck(self, timeout_s: float) -> bool:
        return self.has_work and self.seconds > timeout_s


def no_engine() -> StepAge:
    """The step age of a process without an engine: never stuck."""
    return StepAge(0.0, False)


class Beating(Protocol):
    """Who receives our heartbeats; a session."""

    def beat(self, frame: bytes) -> None:
        """Called on the heart thread; must not block. `frame` is a serialised Heartbeat frame."""
        ...


class Heart:
    """Gives every session a heartbeat each `interval_s`, from its own thread.

    `step_age` is called on that thread, so a hung engine or event loop cannot hide behind a live heart.
    `add` and `remove` from any thread.
    """

    def __init__(self, step_age: Callable[[], StepAge], *, interval_s: float = DEFAULT_INTERVAL_S) -> None:
        self._step_age = step_age
        self._interval_s = interval_s
        self._lock = Lock()
        self._beating: set[Beating] = set()
        self._sequence = 0
        self._stopped = Event()
        self._thread = Thread(target=self._run, name="sluice-heart", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended. Harmless if it never started."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    def add(self, session: Beating) -> None:
        with self._lock:
            self._beating.add(session)

    def remove(self, session: Beating) -> None:
        with self._lock:
            self._beating.discard(session)

    def beat(self) -> None:
        """One heartbeat to everyone."""
        age = self._step_age()
        self._sequence += 1
        heartbeat = pb.Heartbeat(
            sequence=self._sequence, step_age_ms=min(int(age.seconds * 1000), 2**32 - 1), has_work=age.has_work
        )
        frame = pb.Frame(heartbeat=heartbeat).SerializeToString()
        with self._lock:
            beating = list(self._beating)
        for session in beating:
            session.beat(frame)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self.beat()


class Liveness:
    """What a peer's heartbeats tell. One thread.

    Silence is counted in ticks of our own heart that were handled, not in clock time: when this process was
    frozen or too busy to read, heartbeats wait unread, and the peer must not be blamed for that.
    """

    def __init__(
        self,
        *,
        interval_s: float = DEFAULT_INTERVAL_S,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        step_timeout_s: float = DEFAULT_STEP_TIMEOUT_S,
    ) -> None:
        self._max_missed = max(2, ceil(timeout_s / interval_s - 1e-6))
        self._interval_s = interval_s
        self._step_timeout_s = step_timeout_s
        self._missed = 0
        self._step = StepAge(0.0, False)

    def heard(self, heartbeat: pb.Heartbeat) -> None:
        self._missed = 0
        self._step = StepAge(heartbeat.step_age_ms / 1000, heartbeat.has_work)

    def tick(self) -> str:
        """One interval passed. Why the peer must be given up; "" while all is well."""
        self._missed += 1
        if self._missed > self._max_missed:
            return f"no heartbeat for {self._max_missed * self._interval_s:.2f} s"
        if self._step.stuck(self._step_timeout_s):
            return f"no step for {self._step.seconds:.1f} s with work waiting, the limit is {self._step_timeout_s:g} s"
        return ""

"""Ctrl-C and SIGTERM as one exception in the main thread."""

from __future__ import annotations

import signal
from types import FrameType


class Stop(BaseException):
    """We are asked to stop. No Exception: whatever is under way must not catch it."""


class StopSignals:
    """Each signal raises Stop in the main thread, until `ignore`."""

    def take(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._raise)

    def ignore(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        raise Stop(signal.Signals(number).name)

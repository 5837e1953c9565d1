"""Ctrl-C and SIGTERM as one exception in the main thread."""

from __future__ import annotations

import signal
from types import FrameType


class Stop(KeyboardInterrupt):
    """We are asked to stop. No Exception: whatever is under way must not catch it. Ray's compiled waits let this kind
    through alone, as a plain KeyboardInterrupt; others they print and go on."""


class StopSignals:
    """Each signal raises Stop in the main thread, until `ignore`."""

    def __init__(self) -> None:
        self.asked = False  # one has come, whatever became of its Stop

    def take(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._raise)

    def ignore(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        raise Stop(signal.Signals(number).name)

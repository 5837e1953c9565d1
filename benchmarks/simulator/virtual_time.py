"""An event loop whose time passes only when nothing is left to do now: it then jumps to the next timer.

What runs on it are callbacks and coroutines that wait for each other and for the clock, never for the world outside:
no sockets, no threads. The same calls in the same order give the same run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from selectors import SelectorKey, SelectSelector


class Stalled(RuntimeError):
    """Something is awaited, and nothing is due that could bring it."""


class _Waiting(SelectSelector):
    """Where a loop waits for input. There is none; `pass_time` is told how long the loop would wait for it."""

    def __init__(self, pass_time: Callable[[float], None]) -> None:
        super().__init__()
        self._pass_time = pass_time

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        if timeout is None:
            raise Stalled("nothing is due any more, and the run is not over")
        if timeout > 0:
            self._pass_time(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Begins at 0 s."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Waiting(self._pass))

    def time(self) -> float:
        return self._now

    def _pass(self, seconds: float) -> None:
        self._now += seconds

"""An event loop whose time passes only when nothing is left to do now: it then jumps to the next timer.

What runs on it are callbacks and coroutines that wait for each other and for the clock, never for the world outside:
no sockets, no threads. The same calls in the same order give the same run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from selectors import SelectorKey, SelectSelector
from typing import Any, TypeVar

Result = TypeVar("Result")


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


class _VirtualLoop(asyncio.SelectorEventLoop):
    """Begins at 0 s. What a callback raises ends the run."""

    def __init__(self) -> None:
        self._now = 0.0
        self.failure: BaseException | None = None
        super().__init__(_Waiting(self._pass))
        self.set_exception_handler(self._fail)

    def time(self) -> float:
        return self._now

    def _pass(self, seconds: float) -> None:
        self._now += seconds

    def _fail(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.failure = self.failure or context.get("exception") or RuntimeError(context["message"])
        self.stop()


def run(main: Coroutine[object, object, Result]) -> Result:
    """Raises what `main` or a callback raises, and Stalled."""
    loop = _VirtualLoop()
    try:
        task = loop.create_task(main)
        task.add_done_callback(lambda _: loop.stop())
        loop.run_forever()
        if loop.failure is not None:
            raise loop.failure
        return task.result()
    finally:
        loop.set_exception_handler(lambda loop, context: None)  # of what has not ended
        loop.close()

"""The processors that workers of one machine share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Final

_DONE_S: Final = 1e-9  # of work left


@dataclass(slots=True, eq=False)
class _Job:
    left_s: float
    then: Callable[[], None]


class Cores:
    """Where more compute at once than there are cores, all of them go slower by as much. `num_cores` inf: everybody has
    a machine of its own. `num_others`: as many compute there all the time, and take their fair share; fractions may be
    those that compute now and then."""

    def __init__(self, num_cores: float, num_others: float, loop: asyncio.AbstractEventLoop) -> None:
        if not num_cores > 0:
            raise ValueError(f"{num_cores} cores: work on them would never end")
        self._num_cores = num_cores
        self._num_others = num_others
        self._loop = loop
        self._jobs: list[_Job] = []
        self._seen_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def compute(self, seconds: float, then: Callable[[], None]) -> None:
        """Work of so many seconds of one core, and what comes after it."""
        if self._num_cores == inf:
            self._loop.call_later(seconds, then)
            return
        self._go_on()
        self._jobs.append(_Job(seconds, then))
        self._wait()

    @property
    def _pace(self) -> float:
        return min(1.0, self._num_cores / (len(self._jobs) + self._num_others))

    def _go_on(self) -> None:
        """Accounts for what was done since the last time."""
        now = self._loop.time()
        if self._jobs:
            done_s = (now - self._seen_at) * self._pace
            for job in self._jobs:
                job.left_s -= done_s
        self._seen_at = now

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._jobs:
            left_s = max(0.0, min(job.left_s for job in self._jobs))
            self._timer = self._loop.call_later(left_s / self._pace, self._end)

    def _end(self) -> None:
        self._timer = None
        self._go_on()
        least_s = min(job.left_s for job in self._jobs)
        ended = [job for job in self._jobs if job.left_s <= max(_DONE_S, least_s)]
        self._jobs = [job for job in self._jobs if job not in ended]
        self._wait()
        for job in ended:
            job.then()

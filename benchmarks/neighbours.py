"""How busy the machine was with what is not ours: whether a figure counts."""

from __future__ import annotations

import os
import time

import psutil


class Neighbours:
    """Counts from when it is made. Ours are this process and its descendants; none may end without being waited for."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._before = _busy_s() - _our_s()

    def num_cores(self) -> float:
        """Cores that others kept busy, on average since the start."""
        foreign = _busy_s() - _our_s() - self._before
        return max(0.0, foreign / (time.perf_counter() - self._started))


def _busy_s() -> float:
    """Of all cores since boot, in seconds."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def _our_s() -> float:
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total

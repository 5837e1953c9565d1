"""How many requests one ingress replica has open: bounded, and refused at once beyond that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import Busy

_MEMORY = 0.1  # weight of the newest duration in the running mean
_MIN_RETRY_S = 1.0
_MAX_RETRY_S = 30.0


class Admission:
    """`limit` open requests over all ingress replicas, divided by the live ones. One thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_replicas = 1
        self._num_open = 0
        self._mean_s = _MIN_RETRY_S

    @property
    def num_open(self) -> int:
        return self._num_open

    @property
    def max_open(self) -> int:
        return max(1, self._limit // self._num_replicas)

    def set_replicas(self, num_replicas: int) -> None:
        """Open requests beyond a lowered share go on; only new ones are refused."""
        self._num_replicas = max(1, num_replicas)

    @contextmanager
    def enter(self, now: float) -> Iterator[_Stay]:
        """Raises Busy when full. `now` is monotonic seconds."""
        if self._num_open >= self.max_open:
            raise Busy(
                f"{self._num_open} requests are open here and the limit is {self.max_open}; retry later",
                retry_after_s=self._retry_after_s(),
            )
        self._num_open += 1
        stay = _Stay(now)
        try:
            yield stay
        finally:
            self._num_open -= 1
            self._mean_s += _MEMORY * (max(0.0, stay.until - now) - self._mean_s)

    def _retry_after_s(self) -> float:
        """About when the next of the open requests ends, if they end as evenly as they lasted."""
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, self._mean_s / self.max_open))


class _Stay:
    """One admitted request; whoever ends it says when."""

    __slots__ = ("until",)

    def __init__(self, now: float) -> None:
        self.until = now

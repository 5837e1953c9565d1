"""How much of something is done in a second, as measured lately: amounts over times, older ones counting less."""

from __future__ import annotations

from typing import Final

_KEPT: Final = 0.9  # of what was measured before, at each measurement


class Rate:
    __slots__ = ("_amount", "_seconds")

    def __init__(self) -> None:
        self._amount = self._seconds = 0.0

    def measured(self, amount: float, seconds: float) -> None:
        if amount > 0 and seconds > 0:
            self._amount = _KEPT * self._amount + amount
            self._seconds = _KEPT * self._seconds + seconds

    @property
    def per_s(self) -> float:
        """0: nothing was measured."""
        return self._amount / self._seconds if self._seconds else 0.0

"""Requests under which workers died together: one at a time is tried again, so that only the guilty one is refused.

    died alone twice ─────────────────────────────────────────────────────▶ refused
    died twice, others beside it ──its turn──▶ on trial ──dies once more──▶ refused
                                                  └──says enough tokens──▶ acquitted, as if nothing had happened

What a request does to a worker is a function of its tokens: one that has gone on well past the place where it died did
not do it. Whoever is lost together with the one on trial is not blamed.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.flight import Flight, State


class Trial:
    """Who is on trial. The router's loop only."""

    def __init__(self) -> None:
        self._flight: Flight | None = None

    @property
    def is_on(self) -> bool:
        flight = self._flight
        return flight is not None and flight.on_trial and flight.state is not State.ENDED

    def take(self, flight: Flight) -> bool:
        """Whether it is this one's turn."""
        if self._flight is not flight and self.is_on:
            return False
        self._flight = flight
        flight.begin_trial()
        return True

    def leave(self, flight: Flight) -> bool:
        """It has ended. Whether the next one's turn comes with that."""
        if self._flight is not flight:
            return False
        self._flight = None
        return True


def blamed(lost: Sequence[Flight]) -> Sequence[Flight]:
    """Of those that were lost with one worker, who may have done it."""
    return [flight for flight in lost if flight.on_trial] or lost

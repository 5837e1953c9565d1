"""Whether something that was sampled over time grows: its slope against its own noise. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WARM_UP = 0.25  # of the time: caches fill, pools are made
NUM_PIECES = 10  # neighbours are alike, so means of pieces are compared, not samples
STEEP = 4.0  # standard errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Flatness:
    """Of one series after its warm-up. `growth`: slope x time; `noise`: standard error of that."""

    first: float
    last: float
    growth: float
    noise: float
    allowed: float

    @property
    def flat(self) -> bool:
        """A growth that noise may explain, or that is too small to matter, is none."""
        return self.growth <= max(self.allowed, STEEP * self.noise)


def flatness(seconds: Sequence[float], values: Sequence[float], allowed: float) -> Flatness:
    """Raises ValueError for fewer samples than pieces."""
    at, value = np.asarray(seconds, np.float64), np.asarray(values, np.float64)
    warm = at >= at[0] + WARM_UP * (at[-1] - at[0]) if len(at) else np.zeros(0, bool)
    at, value = at[warm], value[warm]
    if len(at) < NUM_PIECES:
        raise ValueError(f"{len(at)} samples after the warm-up; {NUM_PIECES} are needed")
    x = np.array([piece.mean() for piece in np.array_split(at, NUM_PIECES)])
    y = np.array([piece.mean() for piece in np.array_split(value, NUM_PIECES)])
    centred = x - x.mean()
    slope = float((centred * y).sum() / (centred**2).sum())
    left = y - y.mean() - slope * centred
    error = float(np.sqrt((left**2).sum() / (NUM_PIECES - 2) / (centred**2).sum()))
    span = float(at[-1] - at[0])
    return Flatness(first=float(y[0]), last=float(y[-1]), growth=slope * span, noise=error * span, allowed=allowed)

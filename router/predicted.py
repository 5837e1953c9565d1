"""Blocks that workers will hold soon, because requests were just sent there: siblings follow before the first event.

An entry lives for `PREDICTED_S`, and at most half as long again. It stands in the table of the window in which it was
made; a window goes as a whole. Windows are bounded: where more is predicted than they hold, the oldest go early.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Final, NamedTuple

import numpy as np

from router.holder_table import SEATS_PER_WORD, Bits, HolderTable, Keys

PREDICTED_S: Final = 5.0
_WINDOW_S: Final = PREDICTED_S / 2
_WINDOW_ROWS: Final = 1 << 18
_MAX_WINDOWS: Final = 4


class _Window(NamedTuple):
    begun_at: float
    table: HolderTable


class Predicted:
    """Seats are those of the PrefixIndex. `now` is monotonic seconds. One thread."""

    def __init__(self) -> None:
        self._windows: deque[_Window] = deque()

    def add(self, seats: Collection[int], keys: Keys, now: float) -> None:
        """Each of the seats will hold all the keys, which are each there once."""
        num_words = max(seats, default=0) // SEATS_PER_WORD + 1
        self._expire(now)
        newest = self._windows[-1] if self._windows else None
        if newest is None or now - newest.begun_at >= _WINDOW_S or not newest.table.has_room(len(keys)):
            newest = _Window(now, HolderTable(max(_WINDOW_ROWS, len(keys)), num_words))
            self._windows.append(newest)
            if len(self._windows) > _MAX_WINDOWS:
                self._windows.popleft()
        if newest.table.num_words < num_words:
            newest.table.widen(num_words)
        bits = np.zeros(num_words, np.uint64)
        for seat in seats:
            bits[seat // SEATS_PER_WORD] |= np.uint64(1 << seat % SEATS_PER_WORD)
        newest.table.merge(keys, bits[None, :])

    def forget(self, seat: int) -> None:
        """What was predicted of it will not come, or has."""
        for _, table in self._windows:
            table.clear_seat(seat)

    def add_holders(self, keys: Keys, bits: Bits, now: float) -> None:
        """Into `bits`, as PrefixIndex.holders makes them of the same keys."""
        self._expire(now)
        for _, table in self._windows:
            num_words = min(table.num_words, bits.shape[1])
            bits[:, :num_words] |= table.holders(keys)[:, :num_words]

    def _expire(self, now: float) -> None:
        while self._windows and now - self._windows[0].begun_at >= _WINDOW_S + PREDICTED_S:
            self._windows.popleft()

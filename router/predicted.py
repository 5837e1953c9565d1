"""Blocks that workers will hold soon, because requests were just sent there: siblings follow before the first event.

An entry lives for `PREDICTED_S`, and at most half as long again. It stands in the tree of the window in which it was
made; a window goes as a whole. Windows are bounded: where more is predicted than they hold, the oldest go early.

A tree is a radix tree over hash chains. Whoever will hold a block will hold those before it, so a chain that nobody
sent before is one node, and a look-up costs a comparison of two arrays for each place where chains part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import numpy as np

from router.holder_table import SEATS_PER_WORD, Bits, Keys

PREDICTED_S: Final = 5.0
_WINDOW_S: Final = PREDICTED_S / 2
_WINDOW_BYTES: Final = 32 << 20
_MAX_WINDOWS: Final = 4
_NODE_BYTES: Final = 512  # about, with its dictionary and the head of its array


class Prediction(NamedTuple):
    """Blocks `first` up to `last` of a chain will be held by `seats`, one bit each."""

    first: int
    last: int
    seats: int


class _Node:
    """A run of blocks with the same seats; what comes after it, by its first key."""

    __slots__ = ("after", "keys", "seats")

    def __init__(self, keys: Keys, seats: int) -> None:
        self.keys = keys
        self.seats = seats
        self.after: dict[int, _Node] = {}

    def split(self, at: int) -> None:
        rest = _Node(self.keys[at:], self.seats)
        rest.after, self.after = self.after, {int(self.keys[at]): rest}
        self.keys = self.keys[:at]


class _Window:
    def __init__(self, begun_at: float) -> None:
        self.begun_at = begun_at
        self.num_bytes = 0  # about
        self._roots: dict[int, _Node] = {}

    def add(self, keys: Keys, seats: int) -> None:
        nodes, first = self._roots, 0
        while first < len(keys):
            node = nodes.get(int(keys[first]))
            if node is None:
                rest = keys[first:].copy() if first else keys  # a view would keep all of them
                nodes[int(rest[0])] = _Node(rest, seats)
                self.num_bytes += _NODE_BYTES + rest.nbytes
                return
            num_same = _num_same(node.keys, keys[first:])
            first += num_same
            has_more = first < len(keys)
            if num_same < len(node.keys) and (has_more or node.seats | seats != node.seats):
                node.split(num_same)
                self.num_bytes += _NODE_BYTES
            node.seats |= seats
            nodes = node.after

    def find(self, keys: Keys) -> Iterator[Prediction]:
        nodes, first = self._roots, 0
        while first < len(keys) and (node := nodes.get(int(keys[first]))) is not None:
            num_same = _num_same(node.keys, keys[first:])
            yield Prediction(first, first + num_same, node.seats)
            if num_same < len(node.keys):
                return
            nodes, first = node.after, first + num_same

    def forget(self, seats: int) -> None:
        """Looks at every node."""
        open_ = list(self._roots.values())
        while open_:
            node = open_.pop()
            node.seats &= ~seats
            open_ += node.after.values()


def _num_same(left: Keys, right: Keys) -> int:
    """From the first one on."""
    length = min(len(left), len(right))
    differ = left[:length] != right[:length]
    first = int(differ.argmax())
    return first if differ[first] else length


class Predicted:
    """Seats are those of the PrefixIndex. `now` is monotonic seconds. One thread."""

    def __init__(self) -> None:
        self._windows: deque[_Window] = deque()

    def add(self, seats: Iterable[int], keys: Keys, now: float) -> None:
        """Each of the seats will hold all the keys, a chain from its first block on. They are kept: not to be
        written to any more."""
        self._expire(now)
        newest = self._windows[-1] if self._windows else None
        if newest is None or now - newest.begun_at >= _WINDOW_S or newest.num_bytes >= _WINDOW_BYTES:
            newest = _Window(now)
            self._windows.append(newest)
            if len(self._windows) > _MAX_WINDOWS:
                self._windows.popleft()
        newest.add(keys, sum(1 << seat for seat in set(seats)))

    def forget(self, seat: int) -> None:
        """What was predicted of it will not come, or has."""
        for window in self._windows:
            window.forget(1 << seat)

    def find(self, keys: Keys, now: float) -> list[Prediction]:
        """All that is predicted of a chain, in no order."""
        self._expire(now)
        return [prediction for window in self._windows for prediction in window.find(keys)]

    def _expire(self, now: float) -> None:
        while self._windows and now - self._windows[0].begun_at >= _WINDOW_S + PREDICTED_S:
            self._windows.popleft()


def mark(bits: Bits, predictions: Iterable[Prediction]) -> None:
    """Into `bits`, as PrefixIndex.holders makes them of the same chain. Seats beyond them are left out."""
    for first, last, seats in predictions:
        for word in range(bits.shape[1]):
            if held := seats >> word * SEATS_PER_WORD & (1 << SEATS_PER_WORD) - 1:
                bits[first:last, word] |= np.uint64(held)

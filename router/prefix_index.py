"""Which worker holds which blocks: from the hash chain of a prompt to the length of the prefix that each one has.

Block hashes are known by their first 8 bytes. Two of four million blocks share them with a probability of 1 in two
million, and what comes of it is a worker chosen for blocks that it does not have: it computes them.

A *seat* is one shard of one incarnation. What a seat held is gone with it at once: a lookup masks it out. Its number is
used again after the next rebuild. A rebuild moves the rows that somebody holds into another table, some with each
change, so that no call takes long: it begins when the table is full, or when no seat is free.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from operator import neg
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cluster.hashing import HASH_BYTES
from router.holder_table import SEATS_PER_WORD, Bits, HolderTable, Keys

_MIN_ROWS: Final = 1 << 12
_MOVED_ROWS: Final = 1 << 10  # by one change, at least
_FIRST_STEP: Final = 8  # blocks
_MOVED_PER_KEY: Final = 8  # rows, so that the old table is empty before the new one is full


def keys_of(hashes: bytes | Sequence[bytes]) -> Keys:
    """Of 16-byte block hashes, in order. Raises ValueError when `hashes` is no whole number of them."""
    packed = hashes if isinstance(hashes, bytes) else b"".join(hashes)
    if len(packed) % HASH_BYTES:
        raise ValueError(f"{len(packed)} bytes are no whole number of {HASH_BYTES}-byte hashes")
    return np.maximum(np.frombuffer(packed, "<u8")[:: HASH_BYTES // 8], np.uint64(1))


def prefix_depths(bits: Bits) -> NDArray[np.int64]:
    """[num_words * 64 + 1]: of each seat, how many rows from the first one on it holds without a gap; 0 in the last
    place, which is that of seat -1, nobody's."""
    num_words = bits.shape[1]
    depths = np.zeros(num_words * SEATS_PER_WORD + 1, np.int64)
    for word in range(num_words):
        held = np.bitwise_and.accumulate(bits[:, word]).tolist()  # seats only go, so these numbers only fall
        held.append(0)
        row = 0
        while seats := held[row]:
            row = bisect_right(held, -seats, row, key=neg)  # where they are fewer: after few rows
            lost = seats ^ held[row]
            while lost:
                seat = lost.bit_length() - 1
                depths[word * SEATS_PER_WORD + seat] = row
                lost ^= 1 << seat
    return depths


class PrefixIndex:
    """One thread. Keys of one call are each there once, as they are in a hash chain."""

    def __init__(self, num_seats: int = SEATS_PER_WORD) -> None:
        num_words = -(-num_seats // SEATS_PER_WORD)
        self._table = HolderTable(_MIN_ROWS, num_words)
        self._old: HolderTable | None = None  # being left for `_table`
        self._num_moved = 0  # rows of it
        self._alive = np.zeros(num_words, np.uint64)
        self._num_held = np.zeros(num_words * SEATS_PER_WORD, np.int64)
        self._free = list(range(num_words * SEATS_PER_WORD - 1, -1, -1))
        self._retired: list[int] = []  # since the rebuild under way began
        self._leaving: list[int] = []  # before it did: free when it is over

    @property
    def num_blocks(self) -> int:
        """Held by living seats; a block counts for each of its holders."""
        return int(self._num_held.sum())

    @property
    def num_bytes(self) -> int:
        return self._table.num_bytes + (self._old.num_bytes if self._old else 0)

    @property
    def num_seats(self) -> int:
        """For which the words of `holders` have room."""
        return len(self._num_held)

    def num_held(self, seat: int) -> int:
        return int(self._num_held[seat])

    # ------------------------------------------------------------ seats

    def open_seat(self) -> int:
        """A seat that holds nothing."""
        if not self._free:
            self._make_seats()
        seat = self._free.pop()
        word, bit = divmod(seat, SEATS_PER_WORD)
        self._alive[word] |= np.uint64(1 << bit)
        return seat

    def retire_seat(self, seat: int) -> None:
        """Nothing of it is found from now on."""
        word, bit = divmod(seat, SEATS_PER_WORD)
        self._alive[word] &= ~np.uint64(1 << bit)
        self._num_held[seat] = 0
        self._retired.append(seat)

    def _make_seats(self) -> None:
        """One word more. A rebuild widens the rows, and brings back the retired seats."""
        first, num_words = self.num_seats, len(self._alive) + 1
        self._free = list(range(first + SEATS_PER_WORD - 1, first - 1, -1))
        self._alive = np.append(self._alive, np.uint64(0))
        self._num_held = np.append(self._num_held, np.zeros(SEATS_PER_WORD, np.int64))
        if self._old is None:
            self._begin_rebuild(0)
        else:
            self._table.widen(num_words)

    # ------------------------------------------------------------ changes

    def store(self, seat: int, keys: Keys) -> None:
        if not self._table.has_room(len(keys)):
            self._begin_rebuild(len(keys))
        if self._old is not None:
            self._table.merge(keys, self._old.take(keys) & self._alive[: self._old.num_words])
        self._num_held[seat] += self._table.add(keys, seat)
        self._move(len(keys))

    def remove(self, seat: int, keys: Keys) -> None:
        num_removed = self._table.discard(keys, seat)
        if self._old is not None and seat < self._old.num_words * SEATS_PER_WORD:
            num_removed += self._old.discard(keys, seat)
        self._num_held[seat] -= num_removed
        self._move(len(keys))

    def _begin_rebuild(self, num_more: int) -> None:
        """Of more than enough rows for what is held. One that is under way ends first."""
        while self._old is not None:
            self._move(self._old.num_rows)
        num_live = min(self._table.num_used, self.num_blocks) + num_more
        num_until_moved = self._table.num_rows // _MOVED_PER_KEY
        num_rows = max(_MIN_ROWS, num_live + num_live // 2 + num_until_moved)
        self._old, self._num_moved = self._table, 0
        self._table = HolderTable(num_rows, len(self._alive))
        self._leaving, self._retired = self._retired, []

    def _move(self, num_keys: int) -> None:
        """Goes on with a rebuild, after a change of so many keys."""
        old = self._old
        if old is None:
            return
        first = self._num_moved
        self._num_moved = min(old.num_rows, first + max(_MOVED_ROWS, _MOVED_PER_KEY * num_keys))
        keys, bits = old.take_rows(first, self._num_moved, self._alive[: old.num_words])
        if len(keys):
            self._table.merge(keys, bits)
        if self._num_moved == old.num_rows:
            self._old = None
            self._free += self._leaving
            self._leaving = []

    # ------------------------------------------------------------ looking up

    def holders(self, keys: Keys) -> Bits:
        """[n, num_words]: which living seats hold each block."""
        bits = self._table.holders(keys)
        if self._old is not None:
            older = self._old.holders(keys)
            bits[:, : older.shape[1]] |= older
        bits &= self._alive
        return bits

    def num_worth_reading(self, keys: Keys, num_known: int = 0) -> int:
        """After how many of a chain's blocks, at least `num_known`, nobody's prefix goes on. May be too many: it
        looks at few of them."""
        step, alive = num_known, self._alive.tolist()
        while step < len(keys):
            key = int(keys[step])
            held = self._table.is_held(key, alive)
            if not held and (self._old is None or not self._old.is_held(key, alive)):
                return step
            step += max(_FIRST_STEP, 3 * (step - num_known))
        return len(keys)

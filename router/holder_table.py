"""Block keys and who holds them, in two arrays: an open-addressed hash table of buckets, worked on in batches.

A bucket is one cache line of 8 keys, filled from its first lane on; a key whose bucket is full stands in the next one
that is not. Keys are never taken out, so a lookup ends at the first bucket with an empty lane. Rows that nobody holds
any more stay until the table is left for another one. Key 0 marks an empty lane.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from operator import and_
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Keys: TypeAlias = NDArray[np.uint64]
Bits: TypeAlias = NDArray[np.uint64]  # [n, num_words]: bit s of a row says that seat s holds the block
Rows: TypeAlias = NDArray[np.int64]

SEATS_PER_WORD: Final = 64
MAX_LOAD: Final = 0.7  # of the rows; above it too many buckets are full
_LANES: Final = 8
_FEW: Final = 10  # keys: one by one they are found sooner than all at once
_LANE_OF_BYTE: Final = np.uint64(0x0001020304050607)


def _zeros(num_rows: int, num_columns: int) -> NDArray[np.uint64]:
    """Of small pages: numpy would ask for huge ones, and the first keys would commit the whole table at once."""
    return np.frombuffer(mmap.mmap(-1, 8 * num_rows * num_columns), np.uint64).reshape(num_rows, num_columns)


def _flat(rows: NDArray[np.uint64]) -> memoryview:
    """The same numbers in a row, quick to read one by one."""
    return rows.reshape(-1).data


def _matches(lanes: Keys, keys: Keys) -> Keys:
    """[n]: byte i is 1 where lane i of [n, 8] is the key, which one lane is at most."""
    return (lanes == keys[:, None]).view(np.uint64)[:, 0]


def _lane(match: Keys) -> Rows:
    """Which byte is 1; 0 where none is."""
    return ((match * _LANE_OF_BYTE) >> np.uint64(56)).view(np.int64)


def _num_filled(lanes: Keys) -> Rows:
    return np.bitwise_count((lanes != 0).view(np.uint64)[:, 0]).astype(np.int64)


class HolderTable:
    """Room for `num_rows` keys below MAX_LOAD, holders of `num_words` * 64 seats. Memory is committed page by page."""

    __slots__ = ("_buckets", "_flat_buckets", "_flat_holders", "_holders", "_mask", "num_used")

    def __init__(self, num_rows: int, num_words: int) -> None:
        num_buckets = 1 << max(0, (int(num_rows / MAX_LOAD) - 1) // _LANES).bit_length()
        self._buckets = _zeros(num_buckets, _LANES)
        self._holders = _zeros(num_buckets * _LANES, num_words)
        self._flat_buckets, self._flat_holders = _flat(self._buckets), _flat(self._holders)
        self._mask = np.uint64(num_buckets - 1)
        self.num_used = 0  # rows with a key

    @property
    def num_words(self) -> int:
        return self._holders.shape[1]

    @property
    def num_rows(self) -> int:
        return self._holders.shape[0]

    @property
    def num_bytes(self) -> int:
        """Of both arrays, whether committed or not."""
        return self._buckets.nbytes + self._holders.nbytes

    def has_room(self, num_keys: int) -> bool:
        return self.num_used + num_keys <= MAX_LOAD * self.num_rows

    def find(self, keys: Keys) -> Rows:
        """The row of each key; -1 where it has none."""
        home = (keys & self._mask).view(np.int64)
        lanes = self._buckets.take(home, axis=0, mode="wrap")  # none is out of range, and this mode is quicker
        match = _matches(lanes, keys)
        rows = home * _LANES + _lane(match)
        absent = (match == 0).nonzero()[0]
        if absent.size:
            rows[absent] = -1
            self._look_further(keys, home, absent[lanes[absent, -1] != 0], rows)
        return rows

    def _look_further(self, keys: Keys, home: Rows, open_: Rows, rows: Rows) -> None:
        """The bucket of keys[open_] is full: they may stand in the next one that is not."""
        keys, bucket = keys[open_], home[open_]
        while open_.size > _FEW:
            bucket = (bucket + 1) & int(self._mask)
            lanes = self._buckets.take(bucket, axis=0, mode="wrap")
            match = _matches(lanes, keys)
            absent = match == 0
            rows[open_] = np.where(absent, -1, bucket * _LANES + _lane(match))
            more = (absent & (lanes[:, -1] != 0)).nonzero()[0]
            open_, keys, bucket = open_[more], keys[more], bucket[more]
        for index, key, last in zip(open_.tolist(), keys.tolist(), bucket.tolist(), strict=True):
            rows[index] = self._row(key, last + 1)

    def insert(self, keys: Keys) -> Rows:
        """The row of each key, a new one where it had none. Ask for room first: a full table never returns. Keys are
        each there once, here and in all that follows."""
        rows = self.find(keys)
        missing = np.flatnonzero(rows < 0)
        if missing.size:
            rows[missing] = self._place(keys[missing])
        return rows

    def _place(self, keys: Keys) -> Rows:
        """The new rows of keys that have none."""
        self.num_used += len(keys)
        buckets = (keys & self._mask).view(np.int64)
        rows, left = np.empty(len(keys), np.int64), np.arange(len(keys))
        while left.size:
            left = left[np.argsort(buckets[left], kind="stable")]
            bucket = buckets[left]
            begins = np.flatnonzero(np.concatenate(([True], bucket[1:] != bucket[:-1])))  # of runs of one bucket
            rank = np.arange(len(left)) - np.repeat(begins, np.diff(begins, append=len(left)))
            lane = _num_filled(self._buckets.take(bucket, axis=0)) + rank
            fits = lane < _LANES
            placed = left[fits]
            rows[placed] = bucket[fits] * _LANES + lane[fits]
            self._buckets.reshape(-1)[rows[placed]] = keys[placed]
            left = left[~fits]
            buckets[left] = (buckets[left] + 1) & int(self._mask)
        return rows

    def holders(self, keys: Keys) -> Bits:
        """[n, num_words], zero where a key has no row."""
        rows = self.find(keys)
        bits = self._holders.take(rows, axis=0, mode="wrap")
        bits[(rows < 0).nonzero()[0]] = 0
        return bits

    def is_held(self, key: int, alive: Sequence[int]) -> bool:
        """Whether any seat of `alive`, a number for each word, holds one block. Quicker than `holders` of it."""
        row, num_words = self._row(key, key), self.num_words
        if row < 0:
            return False
        held = self._flat_holders[row * num_words : (row + 1) * num_words]
        return any(map(and_, held, alive))

    def _row(self, key: int, bucket: int) -> int:
        """As `find`, of one key, in `bucket`, modulo their number, or after it."""
        flat, mask = self._flat_buckets, len(self._buckets) - 1
        while True:
            first = (bucket & mask) * _LANES
            lanes = flat[first : first + _LANES].tolist()
            if key in lanes:
                return first + lanes.index(key)
            if lanes[-1] == 0:
                return -1
            bucket += 1

    def add(self, keys: Keys, seat: int) -> int:
        """Says that `seat` holds these blocks; how many of them it did not hold before."""
        word, bit = divmod(seat, SEATS_PER_WORD)
        rows = self.insert(keys)
        column, mask = self._holders[:, word], np.uint64(1 << bit)
        before = column[rows]
        column[rows] = before | mask
        return int(np.count_nonzero((before & mask) == 0))

    def discard(self, keys: Keys, seat: int) -> int:
        """How many of these blocks `seat` held; it holds none of them from now on."""
        word, bit = divmod(seat, SEATS_PER_WORD)
        rows = self.find(keys)
        rows = rows[rows >= 0]
        column, mask = self._holders[:, word], np.uint64(1 << bit)
        before = column[rows]
        column[rows] = before & ~mask
        return int(np.count_nonzero(before & mask))

    def clear_seat(self, seat: int) -> None:
        """It holds nothing. Looks at every row."""
        word, bit = divmod(seat, SEATS_PER_WORD)
        if word < self.num_words:
            self._holders[:, word] &= ~np.uint64(1 << bit)

    def merge(self, keys: Keys, bits: Bits) -> None:
        """Adds all holders that `bits`, perhaps of fewer words, names."""
        self._holders[self.insert(keys), : bits.shape[1]] |= bits

    def take(self, keys: Keys) -> Bits:
        """As `holders`; nobody holds them here afterwards."""
        rows = self.find(keys)
        bits = self._holders[rows]
        bits[rows < 0] = 0
        self._holders[rows[rows >= 0]] = 0
        return bits

    def take_rows(self, first: int, last: int, alive: Bits) -> tuple[Keys, Bits]:
        """Keys of rows `first` up to `last` that some seat of `alive` ([num_words]) holds, and who does; nobody holds
        them here afterwards."""
        keys = self._buckets.reshape(-1)[first:last]
        bits = self._holders[first:last] & alive
        self._holders[first:last] = 0
        held = bits.any(axis=1)
        return keys[held], bits[held]

    def widen(self, num_words: int) -> None:
        """More seats. Copies."""
        self._holders = np.pad(self._holders, ((0, 0), (0, num_words - self.num_words)))
        self._flat_holders = _flat(self._holders)

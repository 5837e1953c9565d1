"""Tables of addresses that a kernel reads from pinned host memory: made once, used again when no copy needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

ALIGNMENT = 16  # bytes, of the addresses and lengths that the kernel copies
_LEAST_ROWS = 1024


class Event(Protocol):
    """Of the stream that reads a table; torch.cuda.Event is one."""

    def query(self) -> bool:
        """Whether everything before it is over."""
        ...


class AddressTable:
    """Room for the addresses of `capacity` pieces, on both sides. The storage is int64, as Triton knows no other."""

    def __init__(self, storage: torch.Tensor) -> None:
        self.storage = storage
        self.capacity = len(storage) // 2
        self._addresses = storage.numpy().view(np.uint64)

    def fill(self, sources: NDArray[np.uint64], destinations: NDArray[np.uint64]) -> None:
        """[N] each: the first N entries are sources, the next N destinations."""
        count = len(sources)
        self._addresses[:count] = sources
        self._addresses[count : 2 * count] = destinations


class AddressTables:
    """As many tables as copies are under way at once. One thread calls it."""

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        """`allocate` makes so many int64 of memory that the kernel can read."""
        self._allocate = allocate
        self._free: list[AddressTable] = []
        self._running: deque[tuple[Event, AddressTable]] = deque()  # oldest first, as they end

    def take(self, num_rows: int) -> AddressTable:
        """One that nobody reads; it is lent until `lend` says for how long."""
        while self._running and self._running[0][0].query():
            self._free.append(self._running.popleft()[1])
        while self._free:
            table = self._free.pop()
            if table.capacity >= num_rows:
                return table  # smaller ones are dropped: what was asked for once is asked for again
        capacity = max(_LEAST_ROWS, 1 << (num_rows - 1).bit_length())
        return AddressTable(self._allocate(2 * capacity))

    def lend(self, table: AddressTable, until: Event) -> None:
        """Nobody else gets it before `until`, which is later than those of the tables before it."""
        self._running.append((until, table))


def common_length(lengths: NDArray[np.uint64]) -> int | None:
    """Of all of them; None: they differ, or there is none."""
    return int(lengths[0]) if len(lengths) and bool((lengths == lengths[0]).all()) else None

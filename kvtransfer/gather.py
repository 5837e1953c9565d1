"""One kernel that copies pieces from anywhere a device can read, a peer's memory too, over pieces of its own.

The tables of addresses lie in pinned host memory, which the kernel reads itself: no copy goes before it.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

ALIGNMENT = 16  # bytes, of addresses and lengths
_WORD = 8


@dataclass(frozen=True, slots=True)
class Tactic:
    """`num_programs` is the most multiprocessors that a read takes away from the engine's kernels."""

    num_programs: int
    words: int  # a program's piece
    num_warps: int


BEST = Tactic(32, 8192, 32)  # on an H200, of few and of many bytes; more programs gain 2 % at most


@triton.jit
def _gather(table, num_rows, num_words, WORDS: tl.constexpr):
    pieces_per_row = tl.cdiv(num_words, WORDS)
    for piece in range(tl.program_id(0), num_rows * pieces_per_row, tl.num_programs(0)):
        row = piece // pieces_per_row
        offsets = (piece % pieces_per_row) * WORDS + tl.arange(0, WORDS)
        source = tl.multiple_of(tl.load(table + row).to(tl.pointer_type(tl.int64)), 16)
        destination = tl.multiple_of(tl.load(table + num_rows + row).to(tl.pointer_type(tl.int64)), 16)
        here = offsets < num_words
        tl.store(destination + offsets, tl.load(source + offsets, mask=here), mask=here)


class Gather:
    """Copies on a stream of its own, before the kernels that wait on others. One thread calls it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device, priority=-1)
        self._tables: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()  # of copies that may still run

    def __call__(
        self,
        sources: NDArray[np.uint64],
        destinations: NDArray[np.uint64],
        lengths: NDArray[np.uint64],
        tactic: Tactic = BEST,
    ) -> torch.cuda.Event:
        """[N] addresses and bytes, all multiples of ALIGNMENT; the event is over when all are copied. Pieces of one
        length go in one launch."""
        while self._tables and self._tables[0][0].query():
            self._tables.popleft()
        event = torch.cuda.Event()
        tables: list[torch.Tensor] = []
        with torch.cuda.device(self._device), torch.cuda.stream(self.stream):
            for length, rows in _by_length(lengths):
                table = torch.empty((2, len(sources[rows])), dtype=torch.int64, pin_memory=True)
                addresses = table.numpy().view(np.uint64)
                addresses[0], addresses[1] = sources[rows], destinations[rows]
                num_words = length // _WORD
                pieces = table.shape[1] * -(-num_words // tactic.words)
                grid = (min(tactic.num_programs, pieces),)
                _gather[grid](table, table.shape[1], num_words, WORDS=tactic.words, num_warps=tactic.num_warps)
                tables.append(table)
            event.record(self.stream)
        self._tables.append((event, tables))
        return event

    def wait(self) -> None:
        self.stream.synchronize()


def _by_length(lengths: NDArray[np.uint64]) -> Iterator[tuple[int, slice | NDArray[np.bool_]]]:
    """Which rows have it, for each length: mostly all of them have one."""
    if len(lengths) and (lengths == lengths[0]).all():
        yield int(lengths[0]), slice(None)
        return
    for length in np.unique(lengths):
        yield int(length), lengths == length

"""One kernel that copies pieces from anywhere a device can read, a peer's memory too, over pieces of its own.

The tables of addresses lie in pinned host memory, which the kernel reads itself: no copy goes before it.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from triton.compiler import CompiledKernel

from kvtransfer.address_tables import AddressTable, AddressTables, common_length

_WORD = 8


@dataclass(frozen=True, slots=True)
class Tactic:
    """`num_programs` is the most multiprocessors that a read takes away from the engine's kernels."""

    num_programs: int
    words: int  # a program's piece
    num_warps: int


BEST = Tactic(32, 8192, 32)  # on an H200, of few and of many bytes; more programs gain 2 % at most


# Of the number of pieces Triton would make kernels of its own: for one, for sixteen, for others.
@triton.jit(do_not_specialize=["num_rows"])
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
    """Copies on a stream of its own, before the kernels that wait on others. One thread calls it.

    What Triton does for a launch, looking for the kernel that was compiled for such arguments, takes longer than many a
    copy: it is done once for each length of pieces.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device, priority=-1)
        self._tables = AddressTables(lambda count: torch.empty(count, dtype=torch.int64, pin_memory=True))
        self._compiled: dict[tuple[int, Tactic], CompiledKernel] = {}  # by words of a piece

    def __call__(
        self,
        sources: NDArray[np.uint64],
        destinations: NDArray[np.uint64],
        lengths: NDArray[np.uint64] | int,
        tactic: Tactic = BEST,
    ) -> torch.cuda.Event:
        """[N] addresses and bytes, or the bytes of all, all multiples of ALIGNMENT; the event is over when all are
        copied. Pieces of one length go in one launch."""
        event = torch.cuda.Event()
        with torch.cuda.device(self._device):
            lent: list[AddressTable] = []
            if isinstance(lengths, int):
                lent.append(self._launch(sources, destinations, lengths, tactic))
            else:
                for length, rows in _by_length(lengths):
                    lent.append(self._launch(sources[rows], destinations[rows], length, tactic))
            event.record(self.stream)
        for table in lent:
            self._tables.lend(table, event)
        return event

    def wait(self) -> None:
        self.stream.synchronize()

    def _launch(
        self, sources: NDArray[np.uint64], destinations: NDArray[np.uint64], length: int, tactic: Tactic
    ) -> AddressTable:
        num_rows, num_words = len(sources), length // _WORD
        table = self._tables.take(num_rows)
        table.fill(sources, destinations)
        grid = (max(1, min(tactic.num_programs, num_rows * -(-num_words // tactic.words))), 1, 1)
        compiled = self._compiled.get((num_words, tactic))
        if compiled is not None:
            compiled[grid](table.storage, num_rows, num_words, tactic.words, stream=self.stream.cuda_stream)
            return table
        with torch.cuda.stream(self.stream):
            self._compiled[num_words, tactic] = _gather[grid](
                table.storage, num_rows, num_words, WORDS=tactic.words, num_warps=tactic.num_warps
            )
        return table


def _by_length(lengths: NDArray[np.uint64]) -> Iterator[tuple[int, slice | NDArray[np.bool_]]]:
    """Which rows have it, for each length: mostly all of them have one."""
    if (common := common_length(lengths)) is not None:
        yield common, slice(None)
        return
    for length in np.unique(lengths):
        yield int(length), lengths == length

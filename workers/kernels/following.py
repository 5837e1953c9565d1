"""Launches that begin before the kernel ahead of them has ended (programmatic dependent launch), and what they may do
until then."""

# pyright: reportMissingImports=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.kernels.launcher import power_of_two

LINE = 64  # elements of two bytes that are fetched at once
_MOST_LINES = 1024  # of one program
_FETCH: tl.constexpr = tl.constexpr("prefetch.global.L2 [$1];\nmov.b32 $0, 0;")


@triton.jit
def follow():
    """First of all in a kernel that is launched with `launch_pdl`: lets the next one come, and waits for what the one
    before wrote. Nothing may be read or written ahead of it."""
    gdc_launch_dependents()
    gdc_wait()


@triton.jit
def fetch(lines):
    """Pointers to what no kernel ahead writes: on its way to the L2 from now on."""
    tl.inline_asm_elementwise(_FETCH, "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def fetch_share(ptr, size, program, LINES: tl.constexpr, LINE: tl.constexpr):
    """The same of a matrix that the next kernel reads, LINES of it by each program."""
    if LINES:
        at = (program.to(tl.int64) * LINES + tl.arange(0, LINES)) * LINE
        fetch(ptr + tl.minimum(at, size - 1))


def lines_of(matrix: Tensor | None, programs: int) -> int:
    """For `fetch_share`; 0 where there is none, or more than those programs should ask for."""
    if matrix is None or matrix.element_size() != 2 or matrix.numel() > _MOST_LINES * LINE * programs:
        return 0
    return power_of_two(-(-matrix.numel() // (LINE * programs)))

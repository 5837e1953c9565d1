"""Launches that begin before the kernel ahead of them has ended (programmatic dependent launch), and what they may do
until then."""

# pyright: reportMissingImports=false
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINE = 64  # elements of two bytes that are fetched at once
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

"""Launches that begin before the kernel ahead of them has ended (programmatic dependent launch)."""

# pyright: reportMissingImports=false
from __future__ import annotations

import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def follow():
    """First of all in a kernel that is launched with `launch_pdl`: lets the next one come, and waits for what the one
    before wrote. Nothing may be read or written ahead of it."""
    gdc_launch_dependents()
    gdc_wait()

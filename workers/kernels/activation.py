"""silu(gate) * up in one pass, in Triton. Reference: GatedMlp of workers.layers.mlp. Shapes: T rows, I inner size."""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow
from workers.kernels.launcher import Launcher

_BLOCK = 1024


@triton.jit
def _silu_mul(both_ptr, out_ptr, size, BLOCK: tl.constexpr):
    follow()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < size
    gate = tl.load(both_ptr + row * 2 * size + cols, mask=mask, other=0.0)
    up = tl.load(both_ptr + row * 2 * size + size + cols, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_ptr + row * size + cols, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=mask)


_launch_silu_mul = Launcher(_silu_mul)


def silu_mul(both: Tensor) -> Tensor:
    """[T, 2 I], gates first, contiguous -> [T, I]."""
    rows, size = both.shape[0], both.shape[1] // 2
    out = torch.empty(rows, size, dtype=both.dtype, device=both.device)
    grid = (rows, -(-size // _BLOCK), 1)
    _launch_silu_mul(grid, (both, out, size), {"BLOCK": _BLOCK}, num_warps=4)
    return out

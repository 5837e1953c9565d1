"""silu(gate) * up in one pass, in Triton. Reference: GatedMlp of workers.layers.mlp. Shapes: T rows, d hidden, I inner
size."""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow
from workers.kernels.launcher import Launcher, power_of_two
from workers.kernels.norms import MANY_ROWS, PendingNorm, norm_factor

_BLOCK = 1024
_PENDING_BLOCK = 4096


@triton.jit
def _silu_mul(
    both_ptr,
    out_ptr,
    size,
    rows_ptr,
    features,
    eps,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of one program
    PENDING: tl.constexpr,  # a power of two from `features` on; 0: no norm is pending
):
    follow()
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0
    for i in tl.static_range(BLOCKS):
        cols = (tl.program_id(1) * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        mask = cols < size
        gate = tl.load(both_ptr + row * 2 * size + cols, mask=mask, other=0.0)
        up = tl.load(both_ptr + row * 2 * size + size + cols, mask=mask, other=0.0)
        if PENDING and i == 0:
            factor = norm_factor(rows_ptr + row * features, features, eps, PENDING)
        wide, wide_up = gate.to(tl.float32) * factor, up.to(tl.float32) * factor
        silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
        tl.store(out_ptr + row * size + cols, (silu.to(tl.float32) * wide_up).to(gate.dtype), mask=mask)


_launch_silu_mul = Launcher(_silu_mul)


def silu_mul(both: Tensor, pending: PendingNorm | None = None) -> Tensor:
    """[T, 2 I], gates first, contiguous, made of `pending` [T, d] or of normed rows -> [T, I]."""
    rows, size = both.shape[0], both.shape[1] // 2
    out = torch.empty(rows, size, dtype=both.dtype, device=both.device)
    if pending is None:
        grid = (rows, -(-size // _BLOCK), 1)
        constants = {"BLOCK": _BLOCK, "BLOCKS": 1, "PENDING": 0}
        _launch_silu_mul(grid, (both, out, size, both, 1, 0.0), constants, num_warps=4)
        return out
    blocks, features = -(-size // _PENDING_BLOCK), pending.rows.shape[1]
    each = blocks if rows >= MANY_ROWS else 1
    constants = {"BLOCK": _PENDING_BLOCK, "BLOCKS": each, "PENDING": power_of_two(features)}
    arguments = (both, out, size, pending.rows, features, pending.eps)
    _launch_silu_mul((rows, blocks // each, 1), arguments, constants, num_warps=8)
    return out

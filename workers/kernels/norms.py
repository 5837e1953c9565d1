"""RMS norm of rows, alone or with the addition to the residual stream before it, in Triton. Reference: RmsNorm of
workers.layers.norm. Shapes: T rows, d features.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow


@triton.jit
def _rms_norm(
    x_ptr, delta_ptr, weight_ptr, sum_ptr, out_ptr, size, x_stride, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr
):
    follow()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < size
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * size + cols, mask=mask, other=0.0)
        # Rounded before it is normed: what is normed is what the next layer finds in the stream.
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row * size + cols, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / size + eps)
    normed = (wide * scale).to(x.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + cols, (normed * weight).to(x.dtype), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, d], rows contiguous, weight [d] -> [T, d]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, warps = _launch(x.shape[1])
    _rms_norm[(x.shape[0],)](
        x,
        x,
        weight,
        out,
        out,
        x.shape[1],
        x.stride(0),
        eps,
        HAS_DELTA=False,
        BLOCK=block,
        num_warps=warps,
        launch_pdl=True,
    )
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, delta [T, d], contiguous -> (x + delta, its norm), both new."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    block, warps = _launch(x.shape[1])
    _rms_norm[(x.shape[0],)](
        x,
        delta,
        weight,
        total,
        out,
        x.shape[1],
        x.stride(0),
        eps,
        HAS_DELTA=True,
        BLOCK=block,
        num_warps=warps,
        launch_pdl=True,
    )
    return total, out


def _launch(size: int) -> tuple[int, int]:
    block = triton.next_power_of_2(size)
    return block, min(max(block // 512, 1), 16)

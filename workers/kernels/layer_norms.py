"""Layer norm of a sum, in Triton. Reference: LayerNorm of workers.layers.norm. Shapes: T rows, d features."""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow
from workers.kernels.launcher import Launcher, power_of_two


@triton.jit
def _add_layer_norm(
    x_ptr, delta_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    follow()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < SIZE
    x = tl.load(x_ptr + row * SIZE + cols, mask=mask, other=0.0)
    delta = tl.load(delta_ptr + row * SIZE + cols, mask=mask, other=0.0)
    # Rounded before it is normed: what is normed is what the next layer finds in the stream.
    x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
    tl.store(sum_ptr + row * SIZE + cols, x, mask=mask)
    wide = x.to(tl.float32)
    apart = tl.where(mask, wide - tl.sum(wide) / SIZE, 0.0)
    normed = apart * tl.rsqrt(tl.sum(apart * apart) / SIZE + eps)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * SIZE + cols, (normed * weight + bias).to(x.dtype), mask=mask)


_launch = Launcher(_add_layer_norm)


def add_layer_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, delta [T, d], contiguous, weight, bias [d] -> (x + delta, its norm), both new."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[1]
    block = power_of_two(size)
    arguments = (x, delta, weight, bias, total, out, eps)
    warps = min(max(block // 256, 1), 16)
    _launch((len(x), 1, 1), arguments, {"SIZE": size, "BLOCK": block}, num_warps=warps)
    return total, out

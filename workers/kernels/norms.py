"""RMS norm of rows, alone or with the addition to the residual stream before it, in Triton. References: RmsNorm of
workers.layers.norm, and workers.moe.experts for the sum of experts. Shapes: T rows, d features.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow
from workers.kernels.fp8 import LARGEST, SMALLEST
from workers.kernels.fp8_rows import QuantizedRows, quantize_groups
from workers.kernels.launcher import Launcher, power_of_two

MANY_ROWS = 512  # from so many on, who reads a product reads all of a row, and what its norm is of, once


class PendingNorm(NamedTuple):
    """What a product made of rows as they are is still to be multiplied with the factors of their norm: who reads it
    finds them. Their weights are part of the matrix."""

    rows: Tensor  # [T, d], contiguous
    eps: float


@triton.jit
def norm_factor(row_ptr, size, eps, BLOCK: tl.constexpr):
    """1 / rms of one row of `size` features; BLOCK is a power of two from there on."""
    cols = tl.arange(0, BLOCK)
    wide = tl.load(row_ptr + cols, mask=cols < size, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide) / size + eps)


@triton.jit
def _store_norm(
    x,
    row,
    weight_ptr,
    out_ptr,
    values_ptr,
    scales_ptr,
    size,
    scale_stride,
    eps,
    QUANTIZED: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    mask = cols < size
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / size + eps)
    normed = (wide * scale).to(x.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    normed = (normed * weight).to(x.dtype)
    tl.store(out_ptr + row * size + cols, normed, mask=mask)
    if QUANTIZED:
        values, scales = quantize_groups(tl.reshape(normed.to(tl.float32), (BLOCK // 128, 128)), LARGEST, SMALLEST)
        groups = tl.arange(0, BLOCK // 128)
        tl.store(values_ptr + row * size + cols, tl.reshape(values, (BLOCK,)), mask=mask)
        tl.store(scales_ptr + row + groups.to(tl.int64) * scale_stride, scales, mask=groups < size // 128)


@triton.jit(do_not_specialize=["scale_stride"])
def _rms_norm(
    x_ptr,
    delta_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    values_ptr,
    scales_ptr,
    size,
    x_stride,
    scale_stride,
    eps,
    HAS_DELTA: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
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
    _store_norm(
        x,
        row,
        weight_ptr,
        out_ptr,
        values_ptr,
        scales_ptr,
        size,
        scale_stride,
        eps,
        QUANTIZED,
        BLOCK,
        LARGEST,
        SMALLEST,
    )


_launch_rms_norm = Launcher(_rms_norm)


@triton.jit(do_not_specialize=["scale_stride"])
def _finalize_norm(
    outs_ptr,
    places_ptr,
    shares_ptr,
    base_ptr,
    x_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    values_ptr,
    scales_ptr,
    size,
    scale_stride,
    eps,
    PER_TOKEN: tl.constexpr,
    PLACED: tl.constexpr,
    BASE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    follow()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < size
    x = tl.load(x_ptr + row * size + cols, mask=mask, other=0.0)
    delta = tl.zeros([BLOCK], tl.float32)
    if BASE:
        delta += tl.load(base_ptr + row * size + cols, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(PER_TOKEN):
        share = tl.load(shares_ptr + row * PER_TOKEN + i)
        place = row * PER_TOKEN + i
        if PLACED:
            place = tl.load(places_ptr + place).to(tl.int64)
        delta += share * tl.load(outs_ptr + place * size + cols, mask=mask, other=0.0).to(tl.float32)
    x = (x.to(tl.float32) + delta.to(x.dtype).to(tl.float32)).to(x.dtype)
    tl.store(sum_ptr + row * size + cols, x, mask=mask)
    _store_norm(
        x,
        row,
        weight_ptr,
        out_ptr,
        values_ptr,
        scales_ptr,
        size,
        scale_stride,
        eps,
        QUANTIZED,
        BLOCK,
        LARGEST,
        SMALLEST,
    )


_launch_finalize_norm = Launcher(_finalize_norm)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, d], rows contiguous, weight [d] -> [T, d]."""
    return _launch(x, None, weight, eps, None)[1]


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, delta [T, d], contiguous -> (x + delta, its norm), both new."""
    return _launch(x, delta, weight, eps, None)


class NormedRows(NamedTuple):
    total: Tensor  # [T, d]: what was normed
    normed: Tensor  # [T, d]
    quantized: QuantizedRows  # the same


def rms_norm_quantized(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> NormedRows:
    """As the two above; the norm also in fp8. d is a multiple of 128."""
    out = QuantizedRows.empty(len(x), x.shape[1], x.device)
    return NormedRows(*_launch(x, delta, weight, eps, out), out)


class ExpertOutputs(NamedTuple):
    """Of k experts per token: their weighted sum, in fp32, is what a layer adds."""

    outs: Tensor  # [N, d]
    weights: Tensor  # [T, k] fp32
    base: Tensor | None  # [T, d]: added to the sum
    places: Tensor | None  # [T * k] int32: the row of each entry in `outs`; None: in order


def finalize_rms_norm(
    x: Tensor, delta: ExpertOutputs, weight: Tensor, eps: float, *, quantize: bool
) -> tuple[Tensor, Tensor, QuantizedRows | None]:
    """x [T, d], contiguous -> x + the sum, which is rounded first; its norm; and that in fp8, if asked."""
    quantized = QuantizedRows.empty(len(x), x.shape[1], x.device) if quantize else None
    total, out = torch.empty_like(x), torch.empty_like(x)
    block = power_of_two(x.shape[1])
    arguments = (
        delta.outs,
        out if delta.places is None else delta.places,
        delta.weights,
        out if delta.base is None else delta.base,
        x,
        weight,
        total,
        out,
        out if quantized is None else quantized.values,
        out if quantized is None else quantized.scales,
        x.shape[1],
        0 if quantized is None else quantized.scales.stride(1),
        eps,
    )
    constants = {
        "PER_TOKEN": delta.weights.shape[1],
        "PLACED": delta.places is not None,
        "BASE": delta.base is not None,
        "QUANTIZED": quantize,
        "BLOCK": block,
        "LARGEST": LARGEST,
        "SMALLEST": SMALLEST,
    }
    _launch_finalize_norm((x.shape[0], 1, 1), arguments, constants, num_warps=min(max(block // 256, 1), 16))
    return total, out, quantized


def _launch(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, quantized: QuantizedRows | None
) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if delta is None else torch.empty_like(x)
    block = power_of_two(x.shape[1])
    arguments = (
        x,
        x if delta is None else delta,
        weight,
        total,
        out,
        out if quantized is None else quantized.values,
        out if quantized is None else quantized.scales,
        x.shape[1],
        x.stride(0),
        0 if quantized is None else quantized.scales.stride(1),
        eps,
    )
    constants = {
        "HAS_DELTA": delta is not None,
        "QUANTIZED": quantized is not None,
        "BLOCK": block,
        "LARGEST": LARGEST,
        "SMALLEST": SMALLEST,
    }
    _launch_rms_norm((x.shape[0], 1, 1), arguments, constants, num_warps=min(max(block // 512, 1), 16))
    return total, out

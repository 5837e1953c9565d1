"""Rows of activations become e4m3 with a scale for each 128 features, alone or together with what makes them, in
Triton. Reference: workers.layers.block_fp8.

Shapes: T rows, m features, I inner size, k experts per token, P rows in tiles of 128.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.expert_routing import RowPlan
from workers.kernels.following import follow
from workers.kernels.fp8 import BLOCK, LARGEST, SMALLEST
from workers.kernels.launcher import Launcher, power_of_two

_GROUPS = 8  # of 128 features, that one program takes


class QuantizedRows(NamedTuple):
    """Scales lie feature by feature, each feature's 16-byte aligned: what DeepGEMM's copy engine wants."""

    values: Tensor  # [T, m] e4m3, contiguous
    scales: Tensor  # [T, m / 128] fp32, strides (1, T rounded up to 4)

    @classmethod
    def empty(cls, rows: int, features: int, device: torch.device) -> QuantizedRows:
        scales = torch.empty(features // BLOCK, -(-rows // 4) * 4, dtype=torch.float32, device=device)
        return cls(torch.empty(rows, features, dtype=torch.float8_e4m3fn, device=device), scales.t()[:rows])


@triton.jit
def quantize_groups(x, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """x [G, 128] fp32 -> e4m3 [G, 128], scales [G]."""
    scales = tl.maximum(tl.max(tl.abs(x), 1), SMALLEST) / LARGEST
    return (x / scales[:, None]).to(tl.float8e4nv), scales


@triton.jit(do_not_specialize=["scale_stride"])
def _quantize(
    x_ptr,
    values_ptr,
    scales_ptr,
    x_stride,
    scale_stride,
    features,
    GATED: tl.constexpr,
    GROUPS: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    follow()
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    mask = groups < features // 128
    cols = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask[:, None], other=0.0)
    if GATED:
        up = tl.load(x_ptr + row * x_stride + features + cols, mask=mask[:, None], other=0.0)
        wide = x.to(tl.float32)
        silu = (wide / (1.0 + tl.exp(-wide))).to(x.dtype)
        x = (silu.to(tl.float32) * up.to(tl.float32)).to(x.dtype)
    values, scales = quantize_groups(x.to(tl.float32), LARGEST, SMALLEST)
    tl.store(values_ptr + row * features + cols, values, mask=mask[:, None])
    tl.store(scales_ptr + row + groups.to(tl.int64) * scale_stride, scales, mask=mask)


_launch_quantize = Launcher(_quantize)


def _launch(x: Tensor, features: int, *, gated: bool) -> QuantizedRows:
    assert features % BLOCK == 0, f"{features} features are no multiple of {BLOCK}"
    out = QuantizedRows.empty(len(x), features, x.device)
    groups = min(power_of_two(features // BLOCK), _GROUPS)
    arguments = (x, out.values, out.scales, x.stride(0), out.scales.stride(1), features)
    constants = {"GATED": gated, "GROUPS": groups, "LARGEST": LARGEST, "SMALLEST": SMALLEST}
    _launch_quantize((len(x), -(-(features // BLOCK) // groups), 1), arguments, constants, num_warps=4)
    return out


def quantize_rows(x: Tensor) -> QuantizedRows:
    """x [T, m], features contiguous."""
    return _launch(x, x.shape[1], gated=False)


def silu_mul_quantized(both: Tensor) -> QuantizedRows:
    """both [T, 2 I], gates first, contiguous -> silu(gate) * up, [T, I], rounded to the dtype of `both` before."""
    return _launch(both, both.shape[1] // 2, gated=True)


class TiledRows(NamedTuple):
    """Rows of tokens in tiles of 128, none over two experts: the layout of DeepGEMM's grouped product."""

    rows: QuantizedRows  # [P, m]; rows behind the end of a tile hold anything
    experts: Tensor  # [P] int32, the slot of the row's tile; -1: no such tile
    places: Tensor  # [T * k] int32: the row of each entry


@triton.jit(do_not_specialize=["scale_stride", "out_scale_stride"])
def _tile(
    values_ptr,
    scales_ptr,
    out_ptr,
    out_scales_ptr,
    experts_ptr,
    places_ptr,
    order_ptr,
    tile_slots_ptr,
    tile_starts_ptr,
    tile_ends_ptr,
    scale_stride,
    out_scale_stride,
    features,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    follow()
    tile = tl.program_id(0)
    piece = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    out = tile.to(tl.int64) * 128 + piece
    slot = tl.load(tile_slots_ptr + tile)
    tl.store(experts_ptr + out, tl.full([ROWS], 0, tl.int32) + slot)
    if slot < 0:
        return
    rows = tl.load(tile_starts_ptr + tile) + piece
    valid = rows < tl.load(tile_ends_ptr + tile)
    entries = tl.load(order_ptr + rows, mask=valid, other=0)
    tl.store(places_ptr + entries, out.to(tl.int32), mask=valid)
    tokens = (entries // PER_TOKEN).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    there = valid[:, None] & (groups < features // 128)[None, :]
    scales = tl.load(scales_ptr + tokens[:, None] + groups[None, :].to(tl.int64) * scale_stride, mask=there, other=0.0)
    tl.store(out_scales_ptr + out[:, None] + groups[None, :].to(tl.int64) * out_scale_stride, scales, mask=there)
    for start in range(0, features, 1024):
        cols = start + tl.arange(0, 1024)
        mask = valid[:, None] & (cols < features)[None, :]
        x = tl.load(values_ptr + tokens[:, None] * features + cols[None, :], mask=mask, other=0)
        tl.store(out_ptr + out[:, None] * features + cols[None, :], x, mask=mask)


_launch_tile = Launcher(_tile)


def tile_rows(rows: QuantizedRows, plan: RowPlan, per_token: int) -> TiledRows:
    """rows [T, m]; the plan's tiles hold 128."""
    assert plan.tile == BLOCK, f"tiles of {plan.tile} rows"
    features, num_tiles = rows.values.shape[1], plan.tile_slots.numel()
    device = rows.values.device
    out = QuantizedRows.empty(num_tiles * BLOCK, features, device)
    experts = torch.empty(num_tiles * BLOCK, dtype=torch.int32, device=device)
    places = torch.empty(plan.order.numel(), dtype=torch.int32, device=device)
    piece = 16
    arguments = (
        rows.values.view(torch.uint8),
        rows.scales,
        out.values.view(torch.uint8),
        out.scales,
        experts,
        places,
        plan.order,
        plan.tile_slots,
        plan.tile_starts,
        plan.tile_ends,
        rows.scales.stride(1),
        out.scales.stride(1),
        features,
    )
    constants = {"PER_TOKEN": per_token, "ROWS": piece, "GROUPS": power_of_two(features // BLOCK)}
    _launch_tile((num_tiles, BLOCK // piece, 1), arguments, constants, num_warps=4)
    return TiledRows(out, experts, places)

"""What experts compute in fp8, as two grouped products, in Triton: for few rows per expert, where the rate of memory
decides. Many rows are DeepGEMM's. Reference: workers.layers.block_fp8.

Rows and tiles as in `grouped_gemm`. The first product hands on its rows as e4m3 with scales: a program computes 128
gates and ups, which share one. Sums are fp32; each 128 inputs are scaled before they are added.

Shapes: T tokens, k slots per token, E slots, d hidden, I inner size, N = T * k rows.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from workers.kernels.expert_routing import RowPlan
from workers.kernels.following import follow
from workers.kernels.fp8 import BLOCK, LARGEST, SMALLEST
from workers.kernels.fp8_rows import QuantizedRows
from workers.kernels.grouped_gemm import rows_of_tile, tile_and_column
from workers.kernels.launcher import Launcher
from workers.kernels.tactics import ExpertTactic


class ExpertMatrices(NamedTuple):
    """One matrix of each slot."""

    values: Tensor  # [E, n, m] e4m3, n and m multiples of 128
    scales: Tensor  # [E, n / 128, m / 128] fp32


@triton.jit(do_not_specialize=["x_scale_stride", "out_scale_stride", "num_tiles"])
def _product(
    x_ptr,
    x_scales_ptr,
    weights,  # descriptor
    weight_scales_ptr,
    out_ptr,
    out_scales_ptr,
    order_ptr,
    tile_slots_ptr,
    tile_starts_ptr,
    tile_ends_ptr,
    x_scale_stride,
    out_scale_stride,
    num_tiles,
    features,
    outputs,  # of a row; gates and ups count once
    GATED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SORTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    follow()
    tile, col = tile_and_column(num_tiles, outputs // COLS, GROUP)
    slot = tl.load(tile_slots_ptr + tile)
    if slot < 0:
        return
    inputs, outs, valid = rows_of_tile(tile, order_ptr, tile_starts_ptr, tile_ends_ptr, GATED, PER_TOKEN, SORTED, ROWS)
    height = 2 * outputs if GATED else outputs  # rows of a slot's matrix
    first = slot * height + col * COLS
    num_blocks = features // 128
    scale_at = weight_scales_ptr + (first // 128).to(tl.int64) * num_blocks
    up_scale_at = scale_at + (outputs // 128) * num_blocks
    x_at = x_ptr + inputs.to(tl.int64)[:, None] * features + tl.arange(0, 128)[None, :]
    x_scale_at = x_scales_ptr + inputs.to(tl.int64)
    acc = tl.zeros([COLS, ROWS], tl.float32)
    acc_up = tl.zeros([COLS, ROWS], tl.float32)
    for block in range(num_blocks):
        start = block * 128
        x = tl.load(x_at + start, mask=valid[:, None], other=0.0)
        x_scale = tl.load(x_scale_at + block * x_scale_stride, mask=valid, other=0.0)
        w = weights.load([first, start])
        w_scale = tl.load(scale_at + block)
        acc += tl.dot(w, tl.trans(x)) * (x_scale * w_scale)[None, :]
        if GATED:
            up = weights.load([first + outputs, start])
            up_scale = tl.load(up_scale_at + block)
            acc_up += tl.dot(up, tl.trans(x)) * (x_scale * up_scale)[None, :]
    cols = col * COLS + tl.arange(0, COLS)
    out_at = out_ptr + outs.to(tl.int64)[None, :] * outputs + cols[:, None]
    if GATED:
        # As the unquantised product rounds, whose dtype is bf16.
        gate = acc.to(tl.bfloat16).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(tl.bfloat16).to(tl.float32)
        inner = (silu * acc_up.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16).to(tl.float32)
        scales = tl.maximum(tl.max(tl.abs(inner), 0), SMALLEST) / LARGEST
        tl.store(out_at, (inner / scales[None, :]).to(tl.float8e4nv), mask=valid[None, :])
        tl.store(out_scales_ptr + outs.to(tl.int64) + col.to(tl.int64) * out_scale_stride, scales, mask=valid)
    else:
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=valid[None, :])


_launch_product = Launcher(_product)


def _launch(
    x: QuantizedRows,
    weights: ExpertMatrices,
    out: Tensor,
    out_scales: Tensor,
    plan: RowPlan,
    tactic: ExpertTactic,
    per_token: int,
) -> None:
    """`per_token` 0: the second product."""
    slots, height, features = weights.values.shape
    outputs = height // 2 if per_token else height
    assert outputs % tactic.cols == 0 and BLOCK % tactic.cols == 0, f"tiles of {tactic.cols} of {outputs} outputs"
    num_tiles = plan.tile_slots.numel()
    source = TensorDescriptor(weights.values, [slots * height, features], [features, 1], [tactic.cols, BLOCK])
    arguments = (
        x.values,
        x.scales,
        source,
        weights.scales,
        out,
        out_scales,
        plan.order,
        plan.tile_slots,
        plan.tile_starts,
        plan.tile_ends,
        x.scales.stride(1),
        out_scales.stride(1),
        num_tiles,
        features,
        outputs,
    )
    constants = {
        "GATED": per_token > 0,
        "PER_TOKEN": max(per_token, 1),
        "SORTED": plan.tile > 1,
        "ROWS": tactic.rows,
        "COLS": tactic.cols,
        "GROUP": tactic.group,
        "LARGEST": LARGEST,
        "SMALLEST": SMALLEST,
    }
    _launch_product(
        (num_tiles * (outputs // tactic.cols), 1, 1),
        arguments,
        constants,
        num_warps=tactic.warps,
        num_stages=tactic.stages,
    )


def gate_up(
    x: QuantizedRows, weights: ExpertMatrices, plan: RowPlan, tactic: ExpertTactic, per_token: int
) -> QuantizedRows:
    """x [T, d], weights [E, 2 I, d] (gates first) -> silu(gate) * up, [N, I], in the plan's order of rows."""
    assert tactic.cols == BLOCK, "the features of a program share one scale"
    out = QuantizedRows.empty(plan.order.numel(), weights.values.shape[1] // 2, x.values.device)
    _launch(x, weights, out.values, out.scales, plan, tactic, per_token)
    return out


def down(rows: QuantizedRows, weights: ExpertMatrices, plan: RowPlan, tactic: ExpertTactic) -> Tensor:
    """rows [N, I] in the plan's order, weights [E, d, I] -> bf16 [N, d] in the order of entries."""
    out = torch.empty(len(rows.values), weights.values.shape[1], dtype=torch.bfloat16, device=rows.values.device)
    _launch(rows, weights, out, rows.scales, plan, tactic, 0)
    return out

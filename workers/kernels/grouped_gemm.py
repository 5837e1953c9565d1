"""What experts compute, as two grouped products, in Triton. Reference: workers.moe.experts.

Rows are sorted by slot (`plan_rows`), a program computes one tile of rows of one slot; few entries are not sorted, each
is a tile of its own. Nothing is added atomically: a token's outputs are summed with the norm behind them, in fp32.

Shapes: T tokens, k slots per token, E slots, d hidden, I inner size, N = T * k rows.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from workers.kernels.expert_routing import RowPlan
from workers.kernels.following import follow
from workers.kernels.launcher import Launcher
from workers.kernels.tactics import ExpertTactic

_HIGH = 128  # rows of a tile, from which on the last one of a slot may have half of them


@triton.jit
def tile_and_column(num_tiles, num_cols, GROUP: tl.constexpr):
    """Of this program: GROUP tiles of rows run side by side on one piece of the weights."""
    program = tl.program_id(0)
    group = program // (GROUP * num_cols)
    in_group = tl.minimum(num_tiles - group * GROUP, GROUP)
    place = program % (GROUP * num_cols)
    return group * GROUP + place % in_group, place // in_group


@triton.jit
def rows_of_tile(
    tile,
    order_ptr,
    tile_starts_ptr,
    tile_ends_ptr,
    GATED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SORTED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Which rows are read, which are written, and which of them there are, [ROWS] each. The first product reads its
    token's row and writes in order; the second reads in order and writes to its entry."""
    if SORTED:
        rows = tl.load(tile_starts_ptr + tile) + tl.arange(0, ROWS)
        valid = rows < tl.load(tile_ends_ptr + tile)
        entries = tl.load(order_ptr + rows, mask=valid, other=0)
    else:
        rows = tile + tl.arange(0, ROWS)
        valid = rows < tile + 1
        entries = rows
    if GATED:
        inputs = entries // PER_TOKEN
        outs = rows
    else:
        inputs = rows
        outs = entries
    return inputs, outs, valid


@triton.jit
def _product_of_tile(
    x_ptr,
    rows_of_x,  # its descriptor, where rows that lie together come through the bulk copy engine, too
    weights,  # pointer, or descriptor with TMA
    out_ptr,
    order_ptr,
    tile_starts_ptr,
    tile_ends_ptr,
    tile,
    col,
    slot,
    features,
    outputs,
    GATED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SORTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    BULK_ROWS: tl.constexpr,
):
    inputs, outs, valid = rows_of_tile(tile, order_ptr, tile_starts_ptr, tile_ends_ptr, GATED, PER_TOKEN, SORTED, ROWS)
    cols = col * COLS + tl.arange(0, COLS)
    depth = tl.arange(0, DEPTH)
    x_at = x_ptr + inputs.to(tl.int64)[:, None] * features + depth[None, :]
    height = 2 * outputs if GATED else outputs  # rows of a slot's matrix
    first = slot.to(tl.int64) * height
    safe = tl.minimum(cols, outputs - 1)
    if BULK_ROWS:
        begin = tl.load(tile_starts_ptr + tile)
    if not TMA:
        w_at = weights + (first + safe)[:, None] * features + depth[None, :]
    if SWAP:
        acc = tl.zeros([COLS, ROWS], tl.float32)
        acc_up = tl.zeros([COLS, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, COLS], tl.float32)
        acc_up = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, features, DEPTH):
        # The matrix first: which rows it is multiplied with is not known as soon as that.
        if TMA:
            w = weights.load([(first + col * COLS).to(tl.int32), start])
        elif EVEN:
            w = tl.load(w_at + start)
        else:
            w = tl.load(w_at + start, mask=(start + depth < features)[None, :], other=0.0)
        if BULK_ROWS:
            # Behind a slot's end are rows of the next one, whose outputs are not kept.
            x = rows_of_x.load([begin, start])
        elif EVEN:
            x = tl.load(x_at + start, mask=valid[:, None], other=0.0)
        else:
            x = tl.load(x_at + start, mask=valid[:, None] & (start + depth < features)[None, :], other=0.0)
        if SWAP:
            acc = tl.dot(w, tl.trans(x), acc)
        else:
            acc = tl.dot(x, tl.trans(w), acc)
        if GATED:
            if TMA:
                up = weights.load([(first + outputs + col * COLS).to(tl.int32), start])
            elif EVEN:
                up = tl.load(w_at + outputs.to(tl.int64) * features + start)
            else:
                up = tl.load(
                    w_at + outputs.to(tl.int64) * features + start, mask=(start + depth < features)[None, :], other=0.0
                )
            if SWAP:
                acc_up = tl.dot(up, tl.trans(x), acc_up)
            else:
                acc_up = tl.dot(x, tl.trans(up), acc_up)
    dtype = out_ptr.dtype.element_ty
    if GATED:
        gate = acc.to(dtype).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        acc = silu * acc_up.to(dtype).to(tl.float32)
    if SWAP:
        out_at = out_ptr + outs.to(tl.int64)[None, :] * outputs + cols[:, None]
        tl.store(out_at, acc.to(dtype), mask=valid[None, :] & (cols < outputs)[:, None])
    else:
        out_at = out_ptr + outs.to(tl.int64)[:, None] * outputs + cols[None, :]
        tl.store(out_at, acc.to(dtype), mask=valid[:, None] & (cols < outputs)[None, :])


@triton.jit(do_not_specialize=["num_tiles"])
def _product(
    x_ptr,
    tall_tiles,
    half_tiles,
    weights,
    out_ptr,
    order_ptr,
    tile_slots_ptr,
    tile_starts_ptr,
    tile_ends_ptr,
    num_tiles,
    features,  # inputs
    outputs,  # of a row; gates and ups count once
    GATED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SORTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    HALVES: tl.constexpr,  # the last tile of a slot may be half as high
    BULK_ROWS: tl.constexpr,
):
    follow()
    tile, col = tile_and_column(num_tiles, tl.cdiv(outputs, COLS), GROUP)
    slot = tl.load(tile_slots_ptr + tile)
    if slot < 0:
        return
    half = False
    if HALVES:
        half = tl.load(tile_ends_ptr + tile) - tl.load(tile_starts_ptr + tile) <= ROWS // 2
    for halved in tl.static_range(2 if HALVES else 1):
        if half == (halved == 1):
            _product_of_tile(
                x_ptr,
                half_tiles if halved else tall_tiles,
                weights,
                out_ptr,
                order_ptr,
                tile_starts_ptr,
                tile_ends_ptr,
                tile,
                col,
                slot,
                features,
                outputs,
                GATED,
                PER_TOKEN,
                SORTED,
                ROWS >> halved,
                COLS,
                DEPTH,
                EVEN,
                SWAP,
                TMA,
                BULK_ROWS,
            )


_launch_product = Launcher(_product)


def _launch(x: Tensor, weights: Tensor, out: Tensor, plan: RowPlan, tactic: ExpertTactic, per_token: int) -> None:
    """`per_token` 0: the second product."""
    slots, height, features = weights.shape
    outputs = height // 2 if per_token else height
    num_tiles = plan.tile_slots.numel()
    even = features % tactic.depth == 0
    tma = tactic.tma and even
    source = weights
    if tma:
        source = TensorDescriptor(weights, [slots * height, features], [features, 1], [tactic.cols, tactic.depth])
    high = tactic.rows >= _HIGH and not tactic.swap
    bulk_rows = high and tma and not per_token
    heights = tactic.rows, tactic.rows // 2
    tiles = [TensorDescriptor.from_tensor(x, [each, tactic.depth]) if bulk_rows else x for each in heights]
    arguments = (
        x,
        *tiles,
        source,
        out,
        plan.order,
        plan.tile_slots,
        plan.tile_starts,
        plan.tile_ends,
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
        "DEPTH": tactic.depth,
        "GROUP": tactic.group,
        "EVEN": even,
        "SWAP": tactic.swap,
        "TMA": tma,
        "HALVES": high,
        "BULK_ROWS": bulk_rows,
    }
    _launch_product(
        (num_tiles * -(-outputs // tactic.cols), 1, 1),
        arguments,
        constants,
        num_warps=tactic.warps,
        num_stages=tactic.stages,
    )


def gate_up(x: Tensor, weights: Tensor, plan: RowPlan, tactic: ExpertTactic, per_token: int) -> Tensor:
    """x [T, d], weights [E, 2 I, d] (gates first) -> silu(gate) * up, [N, I], in the plan's order of rows."""
    out = torch.empty(plan.order.numel(), weights.shape[1] // 2, dtype=x.dtype, device=x.device)
    _launch(x, weights, out, plan, tactic, per_token)
    return out


def down(rows: Tensor, weights: Tensor, plan: RowPlan, tactic: ExpertTactic) -> Tensor:
    """rows [N, I] in the plan's order, weights [E, d, I] -> [N, d] in the order of entries."""
    out = torch.empty(rows.shape[0], weights.shape[1], dtype=rows.dtype, device=rows.device)
    _launch(rows, weights, out, plan, tactic, 0)
    return out


def single_rows(slots: Tensor, rows: Tensor) -> RowPlan:
    """Each entry of slots [T, k] is a tile of its own; `rows` is 0, 1, … up to at least T * k, int32."""
    count = slots.numel()
    return RowPlan(rows[:count], slots.view(-1), rows[:count], rows[:count], 1)

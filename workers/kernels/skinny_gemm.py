"""Products of a few rows with one large matrix, which read the matrix once at the rate of memory, in Triton.

The matrix does not depend on the kernel before: the first of it is on its way to the L2 while that one still runs.
Reference: torch.nn.functional.linear; FusedMlp's for the gated one.

Shapes: T rows, d inputs, I outputs.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.kernels.following import LINE, fetch
from workers.kernels.launcher import Launcher
from workers.kernels.tactics import SKINNY_ROWS, SkinnyTactic


@triton.jit
def _product(
    x_ptr,
    w_ptr,
    out_ptr,
    num_rows,
    features,  # inputs
    outputs,  # of a row; gates and ups count once
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    AHEAD: tl.constexpr,  # inputs of the first output features that are fetched ahead
    EVEN: tl.constexpr,
    LINE: tl.constexpr,
):
    gdc_launch_dependents()
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    safe = tl.minimum(cols, outputs - 1).to(tl.int64)
    if AHEAD:
        lines = w_ptr + safe[:, None] * features + (tl.arange(0, AHEAD // LINE) * LINE)[None, :]
        fetch(lines)
        if GATED:
            lines += outputs.to(tl.int64) * features
            fetch(lines)
    gdc_wait()
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    valid = (rows < num_rows)[:, None]
    x_at = x_ptr + rows.to(tl.int64)[:, None] * features + depth[None, :]
    w_at = w_ptr + safe[:, None] * features + depth[None, :]
    up_at = w_at + outputs.to(tl.int64) * features
    acc = tl.zeros([COLS, ROWS], tl.float32)
    acc_up = tl.zeros([COLS, ROWS], tl.float32)
    for start in range(0, features, DEPTH):
        if EVEN:
            x = tl.load(x_at + start, mask=valid, other=0.0)
            w = tl.load(w_at + start)
        else:
            there = (start + depth < features)[None, :]
            x = tl.load(x_at + start, mask=valid & there, other=0.0)
            w = tl.load(w_at + start, mask=there, other=0.0)
        acc = tl.dot(w, tl.trans(x), acc)
        if GATED:
            if EVEN:
                up = tl.load(up_at + start)
            else:
                up = tl.load(up_at + start, mask=(start + depth < features)[None, :], other=0.0)
            acc_up = tl.dot(up, tl.trans(x), acc_up)
    dtype = out_ptr.dtype.element_ty
    if GATED:
        gate = acc.to(dtype).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        acc = silu * acc_up.to(dtype).to(tl.float32)
    out_at = out_ptr + rows.to(tl.int64)[None, :] * outputs + cols[:, None]
    tl.store(out_at, acc.to(dtype), mask=(rows < num_rows)[None, :] & (cols < outputs)[:, None])


_launch_product = Launcher(_product)


def _launch(
    x: Tensor, weight: Tensor, outputs: int, tactic: SkinnyTactic, *, gated: bool, dtype: torch.dtype | None = None
) -> Tensor:
    assert x.is_contiguous() and weight.is_contiguous(), "rows one after the other"
    features = x.shape[1]
    out = torch.empty(len(x), outputs, dtype=dtype or x.dtype, device=x.device)
    arguments = (x, weight, out, len(x), features, outputs)
    constants = {
        "GATED": gated,
        "ROWS": SKINNY_ROWS,
        "COLS": tactic.cols,
        "DEPTH": tactic.depth,
        "AHEAD": tactic.ahead if tactic.ahead <= features else 0,
        "EVEN": features % tactic.depth == 0,
        "LINE": LINE,
    }
    _launch_product(
        (-(-outputs // tactic.cols), -(-len(x) // SKINNY_ROWS), 1),
        arguments,
        constants,
        num_warps=tactic.warps,
        num_stages=tactic.stages,
    )
    return out


def skinny_linear(x: Tensor, weight: Tensor, tactic: SkinnyTactic, dtype: torch.dtype | None = None) -> Tensor:
    """x [T, d], weight [I, d] -> [T, I], in the dtype of x or in `dtype`. For each SKINNY_ROWS of T the matrix is read
    once more."""
    return _launch(x, weight, len(weight), tactic, gated=False, dtype=dtype)


def skinny_gate_up(x: Tensor, both: Tensor, tactic: SkinnyTactic) -> Tensor:
    """x [T, d], both [2 I, d], gates first -> silu(gate) * up, [T, I]. As skinny_linear."""
    return _launch(x, both, len(both) // 2, tactic, gated=True)

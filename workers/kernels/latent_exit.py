"""Out of latent space, for the queries of few tokens, in Triton: a matrix of each head is read once. It does not depend
on the kernel before, so that it is on its way while that one still runs. Reference: torch.bmm.

Shapes: A tokens, H heads, V value size, L latent size.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.kernels.following import LINE, fetch
from workers.kernels.launcher import Launcher, power_of_two

_DEPTH, _STAGES = 128, 4  # latent features of a round, and rounds that are under way


@triton.jit(do_not_specialize=["num_rows"])
def _leave(
    seen_ptr,
    weights_ptr,
    weights_stride,
    out_ptr,
    out_stride,
    num_rows,
    NUM_HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    LINE: tl.constexpr,
):
    gdc_launch_dependents()
    head = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    w_at = weights_ptr + head * weights_stride + cols[:, None] * LATENT
    lines = w_at + (tl.arange(0, LATENT // LINE) * LINE)[None, :]
    fetch(lines)
    gdc_wait()
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    valid = (rows < num_rows)[:, None]
    rows = rows.to(tl.int64)[:, None]
    depth = tl.arange(0, DEPTH)[None, :]
    seen_at = seen_ptr + (rows * NUM_HEADS + head) * LATENT + depth
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, LATENT, DEPTH):
        seen = tl.load(seen_at + start, mask=valid, other=0.0)
        acc = tl.dot(seen, tl.trans(tl.load(w_at + start + depth)), acc)
    at = out_ptr + rows * out_stride + head * SIZE + cols[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=valid)


_launch_leave = Launcher(_leave)


def leave_latents(seen: Tensor, weights: Tensor, out: Tensor) -> None:
    """seen [A, H, L], contiguous, weights [H, V, L], any stride of H -> out [A, H, V], any stride of A. L and V are
    powers of two, 16 or more."""
    heads, size, latent = weights.shape
    count = len(out)
    rows = min(max(power_of_two(count), 16), 64)
    cols = min(size, max(rows, 32))
    arguments = (seen, weights, weights.stride(0), out, out.stride(0), count)
    constants = {"NUM_HEADS": heads, "LATENT": latent, "SIZE": size, "ROWS": rows, "COLS": cols}
    constants |= {"DEPTH": min(latent, _DEPTH), "LINE": min(latent, LINE)}
    _launch_leave((heads, size // cols, -(-count // rows)), arguments, constants, num_warps=4, num_stages=_STAGES)

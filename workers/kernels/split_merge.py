"""How the parts of a context that were attended apart become one result, in Triton. Reference:
workers.attention.merging. Logarithms are of base 2 throughout.

Shapes: B sequences, n queries, m of them that saw one more part, H heads, V value size.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow
from workers.kernels.launcher import Launcher

_HEADS = 16  # that one program merges, of rows


@triton.jit
def _merge(
    parts_ptr,
    lse_ptr,
    out_ptr,
    out_stride,
    lengths_ptr,
    below,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
    ONLY_SHORT: tl.constexpr,
):
    follow()
    sequence = tl.program_id(0).to(tl.int64)
    if ONLY_SHORT and tl.load(lengths_ptr + sequence) >= below:
        return
    splits, features = tl.arange(0, SPLITS), tl.arange(0, SIZE)
    first = tl.program_id(1) * PER_PROGRAM
    for head in range(first, tl.minimum(first + PER_PROGRAM, HEADS)):
        row = sequence * HEADS + head
        lse = tl.load(lse_ptr + row * SPLITS + splits)
        weights = tl.exp2(lse - tl.max(lse))
        weights = weights / tl.sum(weights)
        at = parts_ptr + (row * SPLITS + splits[:, None]) * SIZE + features[None, :]
        # A part that saw nothing was not written.
        parts = tl.load(at, mask=(lse > float("-inf"))[:, None], other=0.0)
        out = tl.sum(parts * weights[:, None], 0)
        tl.store(out_ptr + sequence * out_stride + head * SIZE + features, out.to(out_ptr.dtype.element_ty))


_launch_merge = Launcher(_merge)


def merge_splits(parts: Tensor, lse: Tensor, out: Tensor, lengths: Tensor | None = None, below: int = 0) -> None:
    """parts fp32 [B, H, splits, V], lse fp32 [B, H, splits] (-inf: saw nothing, at least one did not) -> out [B, H, V].

    With `lengths` [B] only sequences with a length under `below` are merged. Splits and V are powers of two.
    """
    num_sequences, heads, splits, size = parts.shape
    # Most programs have nothing to merge where few sequences are short, and starting them is what costs.
    per_program = 1 if lengths is None else 16
    arguments = (parts, lse, out, out.stride(0), lse if lengths is None else lengths, below)
    constants = {
        "SPLITS": splits,
        "HEADS": heads,
        "SIZE": size,
        "PER_PROGRAM": per_program,
        "ONLY_SHORT": lengths is not None,
    }
    _launch_merge(
        (num_sequences, -(-heads // per_program), 1),
        arguments,
        constants,
        num_warps=4 if splits * size > 512 else 1,
    )


@triton.jit
def _merge_rows(
    out_ptr,
    lse_ptr,
    rows_ptr,
    part_ptr,
    part_lse_ptr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
):
    follow()
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)
    exists = heads < HEADS
    before_at, part_at = tl.load(rows_ptr + row) * HEADS + heads, row * HEADS + heads
    before_lse = tl.load(lse_ptr + before_at, mask=exists, other=0.0)
    part_lse = tl.load(part_lse_ptr + part_at, mask=exists, other=0.0)
    best = tl.maximum(before_lse, part_lse)
    weight, part_weight = tl.exp2(before_lse - best), tl.exp2(part_lse - best)
    total = weight + part_weight
    features = tl.arange(0, SIZE)[None, :]
    out_at = out_ptr + before_at[:, None] * SIZE + features
    before = tl.load(out_at, mask=exists[:, None], other=0.0)
    part = tl.load(part_ptr + part_at[:, None] * SIZE + features, mask=exists[:, None], other=0.0).to(tl.float32)
    merged = before * (weight / total)[:, None] + part * (part_weight / total)[:, None]
    tl.store(out_at, merged, mask=exists[:, None])
    tl.store(lse_ptr + before_at, best + tl.log2(total), mask=exists)


_launch_merge_rows = Launcher(_merge_rows)


def merge_rows(out: Tensor, lse: Tensor, rows: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """part [m, H, V], part_lse fp32 [m, H] into `rows` [m] int64, each once, of out fp32 [n, H, V] and lse fp32 [n, H],
    in place. All contiguous; V is a power of two."""
    assert out.is_contiguous() and lse.is_contiguous() and part.is_contiguous() and part_lse.is_contiguous()
    num_rows, heads, size = part.shape
    constants = {"HEADS": heads, "SIZE": size, "PER_PROGRAM": _HEADS}
    grid = (num_rows, -(-heads // _HEADS), 1)
    _launch_merge_rows(grid, (out, lse, rows, part, part_lse), constants, num_warps=4)

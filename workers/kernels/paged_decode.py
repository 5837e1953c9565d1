"""Attention of one query token per sequence over K/V pages, in Triton. Reference: workers.attention.reference.

Each program attends one run of blocks of one sequence for all query heads of a key; a second kernel merges the runs.
How many runs there are depends on shapes alone, lengths are read on the device: the launch is the same in a CUDA graph.

Shapes: B sequences, H query heads, K key/value heads, G = H / K, D head size, S block size, M blocks of the longest.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow
from workers.kernels.launcher import Launcher, power_of_two
from workers.kernels.split_merge import merge_splits
from workers.kernels.tactics import DecodeTactic

LOG2_E = 1.4426950408889634


@triton.jit
def _decode(
    q_ptr,
    q_stride,
    pages_ptr,
    table_ptr,
    table_stride,
    positions_ptr,
    bias_ptr,
    bias_stride,
    parts_ptr,
    lse_ptr,
    out_ptr,
    out_stride,
    layer,
    num_layers,
    scale,
    HAS_BIAS: tl.constexpr,
    LOG2: tl.constexpr,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    follow()
    sequence, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = (tl.load(positions_ptr + sequence) + 1).to(tl.int32)
    num_tiles = tl.cdiv(length, TILE)
    per_split = tl.cdiv(num_tiles, SPLITS)
    first, last = split * per_split, tl.minimum((split + 1) * per_split, num_tiles)
    rows, features, tokens = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, TILE)
    valid = (rows < GROUP)[:, None]
    heads = head * GROUP + rows
    q = tl.load(q_ptr + sequence * q_stride + heads[:, None] * DIM + features[None, :], mask=valid, other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    half = NUM_KV * BLOCK_SIZE * DIM
    tiles_per_block: tl.constexpr = BLOCK_SIZE // TILE
    inside = tokens[:, None] * DIM + features[None, :]
    row_of_table = table_ptr + sequence * table_stride
    ahead = tl.load(row_of_table + tl.minimum(first, num_tiles - 1) // tiles_per_block).to(tl.int64)
    for tile in range(first, last):
        block = ahead
        # One tile ahead: a load that waits for another one in its own round is not pipelined.
        ahead = tl.load(row_of_table + tl.minimum(tile + 1, last - 1) // tiles_per_block).to(tl.int64)
        at = (block * num_layers + layer) * 2 * half + (head * BLOCK_SIZE + tile % tiles_per_block * TILE) * DIM
        seen = tile * TILE + tokens < length
        keys = tl.load(pages_ptr + at + inside)
        # What lies behind the end may be anything, NaN included; a weight of 0 does not silence that in a value.
        values = tl.load(pages_ptr + at + half + inside, mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(keys)) * scale
        if HAS_BIAS:
            distance = length - 1 - tile * TILE - tokens
            added = bias_ptr + heads[:, None] * bias_stride + distance[None, :]
            scores += tl.load(added, mask=valid & seen[None, :], other=0.0).to(tl.float32) * LOG2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
        best = new_best
    if SPLITS == 1:
        at_out = out_ptr + sequence * out_stride + heads[:, None] * DIM + features[None, :]
        tl.store(at_out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=valid)
    else:
        row = (sequence * NUM_KV * GROUP + heads) * SPLITS + split
        if first < last:
            tl.store(parts_ptr + row[:, None] * DIM + features[None, :], acc / total[:, None], mask=valid)
            tl.store(lse_ptr + row, best + tl.log2(total), mask=rows < GROUP)
        else:
            tl.store(lse_ptr + row, tl.full([ROWS], float("-inf"), tl.float32), mask=rows < GROUP)


_launch_decode = Launcher(_decode)


def paged_decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    positions: Tensor,
    layer: int,
    scale: float,
    tactic: DecodeTactic,
    bias: Tensor | None = None,
) -> Tensor:
    """q [B, H, D] (heads side by side, rows of any stride), pages [blocks, layers, 2, K, S, D], block_table [B, M],
    positions [B] of the query tokens -> [B, H * D]. Each sees the tokens up to and including itself.

    bias [H, longest], last dim contiguous: added to the scaled score of the key that stands so far before the query.
    """
    num_sequences, num_heads, dim = q.shape
    _, num_layers, _, num_kv, block_size, _ = pages.shape
    group, splits = num_heads // num_kv, tactic.splits
    out = torch.empty(num_sequences, num_heads, dim, dtype=q.dtype, device=q.device)
    parts = lse = out
    if splits > 1:
        parts = torch.empty(num_sequences, num_heads, splits, dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_sequences, num_heads, splits, dtype=torch.float32, device=q.device)
    arguments = (
        q,
        q.stride(0),
        pages,
        block_table,
        block_table.stride(0),
        positions,
        q if bias is None else bias,
        0 if bias is None else bias.stride(0),
        parts,
        lse,
        out,
        out.stride(0),
        layer,
        num_layers,
        scale * LOG2_E,
    )
    constants = {
        "HAS_BIAS": bias is not None,
        "LOG2": LOG2_E,
        "NUM_KV": num_kv,
        "GROUP": group,
        "DIM": dim,
        "BLOCK_SIZE": block_size,
        "TILE": tactic.tile,
        "SPLITS": splits,
        "ROWS": max(16, power_of_two(group)),
    }
    _launch_decode(
        (num_sequences, num_kv, splits), arguments, constants, num_warps=tactic.warps, num_stages=tactic.stages
    )
    if splits > 1:
        merge_splits(parts, lse, out)
    return out.flatten(1)

"""Attention of one query token per sequence over K/V pages, in Triton. Reference: workers.attention.reference.

Each program attends one run for all query heads of a key. Either each context is cut into as many runs, or all together
as `context_runs` says, which takes a launch more a step; where a context has few of those, who leaves the last part
merges them, else a second kernel does. How many there are depends on shapes alone, lengths are read on the device: the
launch is the same in a CUDA graph.

Shapes: B sequences, H query heads, K key/value heads, G = H / K, D head size, S block size, M blocks of the longest.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.kernels.context_runs import ContextRuns, add_parts, merge_runs
from workers.kernels.launcher import Launcher, power_of_two
from workers.kernels.split_merge import merge_splits
from workers.kernels.tactics import DecodeTactic

LOG2_E = 1.4426950408889634
_LEAST_ROWS = 16  # of a tile of queries, for which a tactic has its warps
_FEW_PARTS = 4  # of a context: who comes last merges them, which costs no launch
_AT_ONCE = 4096  # numbers of parts that are merged


@triton.jit
def _merge_as_last(
    parts_ptr,
    lse_ptr,
    arrived_ptr,
    out_ptr,
    out_stride,
    sequence,
    head,
    first,
    last,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Of one context and key: who leaves the last part merges all. In the order of runs, whoever it is, so that what
    comes out does not depend on who was when."""
    at_arrived = arrived_ptr + sequence * (HEADS // GROUP) + head
    tl.debug_barrier()  # all threads have written theirs
    if tl.atomic_add(at_arrived, 1, sem="acq_rel", scope="gpu") == last - first:
        tl.store(at_arrived, 0)  # for the next layer
        queries, features = tl.arange(0, QUERIES), tl.arange(0, DIM)
        valid = queries < GROUP
        best = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        acc = tl.zeros([QUERIES, DIM], tl.float32)
        for start in range(first, last + 1, RUNS):
            runs = start + tl.arange(0, RUNS)
            rows = (runs + sequence)[:, None] * HEADS + head * GROUP + queries[None, :]
            there = (runs <= last)[:, None] & valid[None, :]
            # Past the L1, which does not see what others write.
            lse = tl.load(lse_ptr + rows, mask=there, other=-1e30, cache_modifier=".cg")
            at = parts_ptr + rows[:, :, None] * DIM + features[None, None, :]
            values = tl.load(at, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
            best, total, acc = add_parts(lse, values, best, total, acc)
        at_out = out_ptr + sequence * out_stride + (head * GROUP + queries)[:, None] * DIM + features[None, :]
        tl.store(at_out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _decode(
    q_ptr,
    q_stride,
    pages_ptr,
    table_ptr,
    table_stride,
    positions_ptr,
    runs_ptr,
    bounds_ptr,
    arrived_ptr,
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
    SPLITS: tl.constexpr,  # 0: runs of all contexts
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    MERGED: tl.constexpr,  # so many runs at once, by who comes last; 0: by another kernel
):
    gdc_launch_dependents()
    # Heads of one block lie side by side, and are read at about the same time: up to 1 % faster than runs side by side.
    head = tl.program_id(0)
    if SPLITS:
        gdc_wait()
        begin = tl.program_id(1).to(tl.int64)
        final = begin
    else:
        at_run = runs_ptr + tl.program_id(1) * 4
        begin, final = tl.load(at_run).to(tl.int64), tl.load(at_run + 1).to(tl.int64)
        first, last = tl.load(at_run + 2), tl.load(at_run + 3)
    some = begin <= final
    length = (tl.load(positions_ptr + begin, mask=some, other=0) + 1).to(tl.int32)
    if SPLITS:
        per_split = tl.cdiv(tl.cdiv(length, TILE), SPLITS)
        first = tl.program_id(2) * per_split
        last = tl.minimum(first + per_split, tl.cdiv(length, TILE))
    rows, features, tokens = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, TILE)
    valid = (rows < GROUP)[:, None]
    heads = head * GROUP + rows
    half = NUM_KV * BLOCK_SIZE * DIM
    tiles_per_block: tl.constexpr = BLOCK_SIZE // TILE
    inside = tokens[:, None] * DIM + features[None, :]
    start = tl.minimum(first, tl.cdiv(length, TILE) - 1) // tiles_per_block
    ahead = tl.load(table_ptr + begin * table_stride + start, mask=some, other=0).to(tl.int64)
    if SPLITS == 0:
        gdc_wait()  # see ContextRuns: where a run begins was known before
    for sequence in range(begin, final + 1):
        num_tiles = tl.cdiv(length, TILE)
        low, high = tl.where(sequence == begin, first, 0), tl.where(sequence == final, last, num_tiles)
        # What the next context begins with is asked for now: later, three loads would wait for each other.
        following = tl.minimum(sequence + 1, final)
        next_position = tl.load(positions_ptr + following)
        next_block = tl.load(table_ptr + following * table_stride)
        q = tl.load(q_ptr + sequence * q_stride + heads[:, None] * DIM + features[None, :], mask=valid, other=0.0)
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        row_of_table = table_ptr + sequence * table_stride
        for tile in range(low, high):
            block = ahead
            # One tile ahead: a load that waits for another one in its own round is not pipelined.
            ahead = tl.load(row_of_table + tl.minimum(tile + 1, high - 1) // tiles_per_block).to(tl.int64)
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
        if (SPLITS == 1) | ((SPLITS == 0) & (high - low == num_tiles)):
            at_out = out_ptr + sequence * out_stride + heads[:, None] * DIM + features[None, :]
            tl.store(at_out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=valid)
        elif SPLITS == 0:
            # Runs and sequences only grow, together: no two parts have one sum.
            row = (tl.program_id(1) + sequence) * NUM_KV * GROUP + heads
            tl.store(parts_ptr + row[:, None] * DIM + features[None, :], acc / total[:, None], mask=valid)
            tl.store(lse_ptr + row, best + tl.log2(total), mask=rows < GROUP)
        else:
            row = (sequence * NUM_KV * GROUP + heads) * SPLITS + tl.program_id(2)
            if low < high:
                tl.store(parts_ptr + row[:, None] * DIM + features[None, :], acc / total[:, None], mask=valid)
                tl.store(lse_ptr + row, best + tl.log2(total), mask=rows < GROUP)
            else:
                tl.store(lse_ptr + row, tl.full([ROWS], float("-inf"), tl.float32), mask=rows < GROUP)
        length = (next_position + 1).to(tl.int32)
        ahead = next_block.to(tl.int64)
    if MERGED:
        for sequence in range(begin, final + 1, tl.maximum(final - begin, 1)):  # others are whole
            first_run, last_run = tl.load(bounds_ptr + sequence * 2), tl.load(bounds_ptr + sequence * 2 + 1)
            if first_run < last_run:
                _merge_as_last(
                    parts_ptr,
                    lse_ptr,
                    arrived_ptr,
                    out_ptr,
                    out_stride,
                    sequence,
                    head,
                    first_run,
                    last_run,
                    GROUP,
                    NUM_KV * GROUP,
                    DIM,
                    QUERIES,
                    MERGED,
                )


_launch_decode = Launcher(_decode)


def paged_decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    positions: Tensor,
    layer: int,
    scale: float,
    how: DecodeTactic | ContextRuns,
    bias: Tensor | None = None,
) -> Tensor:
    """q [B, H, D] (heads side by side, rows of any stride), pages [blocks, layers, 2, K, S, D], block_table [B, M],
    positions [B] of the query tokens -> [B, H * D]. Each sees the tokens up to and including itself.

    bias [H, longest], last dim contiguous: added to the scaled score of the key that stands so far before the query.
    """
    num_sequences, num_heads, dim = q.shape
    _, num_layers, _, num_kv, block_size, _ = pages.shape
    group = num_heads // num_kv
    out = torch.empty(num_sequences, num_heads, dim, dtype=q.dtype, device=q.device)
    parts = lse = out
    cut, few_parts = (positions, positions, positions), False  # not read
    if isinstance(how, ContextRuns):
        tactic, splits, grid = how.tactic, 0, (num_kv, len(how.runs), 1)
        cut, few_parts = (how.runs, how.bounds, how.arrived), len(how.runs) <= _FEW_PARTS * num_sequences
        num_parts = len(how.runs) + num_sequences - 1
        parts = torch.empty(num_parts, num_heads, dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_parts, num_heads, dtype=torch.float32, device=q.device)
    else:
        tactic, splits, grid = how, how.splits, (num_kv, num_sequences, how.splits)
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
        *cut,
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
    rows = max(_LEAST_ROWS, power_of_two(group))
    constants = {
        "HAS_BIAS": bias is not None,
        "LOG2": LOG2_E,
        "NUM_KV": num_kv,
        "GROUP": group,
        "DIM": dim,
        "BLOCK_SIZE": block_size,
        "TILE": tactic.tile,
        "SPLITS": splits,
        "ROWS": rows,
        "QUERIES": power_of_two(group),
        "MERGED": max(_AT_ONCE // (power_of_two(group) * dim), 2) if few_parts else 0,
    }
    _launch_decode(grid, arguments, constants, num_warps=tactic.warps * rows // _LEAST_ROWS, num_stages=tactic.stages)
    if isinstance(how, ContextRuns):
        if not few_parts:
            merge_runs(parts, lse, out, how)
    elif splits > 1:
        merge_splits(parts, lse, out)
    return out.flatten(1)

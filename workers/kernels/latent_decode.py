"""Attention of one query token per sequence over latent rows, in Triton. Reference: workers.attention.mla_reference.

All heads share the rows, so that a row is read once for up to 64 of them. All contexts, one behind the other, are cut
into equal runs of tiles, one for each program, so that the longest context is nobody's alone. A context of several runs
is merged by a second launch. Shapes: B sequences, H heads, L latent size, R rotary size, S block size, M blocks of the
longest.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from workers.kernels.following import follow
from workers.kernels.launcher import Launcher, power_of_two
from workers.kernels.paged_decode import LOG2_E
from workers.kernels.tactics import LatentTactic

MAX_HEADS = 64  # of one program
_LEAST_TOKENS = 64  # of a run, unless a tile is larger
_EXTRA_TOKENS = 64  # that a context costs beside its own
_MOST_AT_ONCE = 32  # runs that are merged
_FEW = 512  # sequences times heads, each of many runs: more programs merge them


@triton.jit
def attend_tile(q, q_rope, latents, rope, seen, scale, best, total, acc):
    """One more tile of rows: latents and rope of those that are `seen`. Returns best, total and acc."""
    scores = tl.dot(q, tl.trans(latents))
    scores = tl.dot(q_rope, tl.trans(rope), scores)
    scores = tl.where(seen[None, :], scores * scale, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - new_best[:, None])
    shrink = tl.exp2(best - new_best)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None] + tl.dot(weights.to(latents.dtype), latents)
    return new_best, total, acc


@triton.jit
def store_part(parts_ptr, lse_ptr, part, valid, saw_any, best, total, acc, LATENT: tl.constexpr, ROWS: tl.constexpr):
    """Of a run of a context, for `merge_splits`."""
    if saw_any:
        at = parts_ptr + part[:, None] * LATENT + tl.arange(0, LATENT)[None, :]
        tl.store(at, acc / total[:, None], mask=valid[:, None])
        tl.store(lse_ptr + part, best + tl.log2(total), mask=valid)
    else:
        tl.store(lse_ptr + part, tl.full([ROWS], float("-inf"), tl.float32), mask=valid)


@triton.jit(do_not_specialize=["num_sequences", "most_runs"])
def _cut(
    positions_ptr,
    num_sequences,
    most_runs,
    runs_ptr,
    bounds_ptr,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    BEFORE: tl.constexpr,
    BEHIND: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    # Who comes next does so when this is done: it is read by many that wait for others alone.
    gdc_wait()
    each = tl.arange(0, SEQUENCES)
    there = each < num_sequences
    tiles = tl.cdiv((tl.load(positions_ptr + each, mask=there, other=-1) + 1).to(tl.int32), TILE)
    # To begin a context and to end it takes a run time, too, as much as some tiles: they stand before and behind it.
    ends = tl.cumsum(tl.where(there, tiles + BEFORE + BEHIND, 0), 0)
    total = tl.max(ends, 0).to(tl.int64)
    stops = tl.where(there, ends - BEHIND, total)  # of its own tiles, as begins are
    begins = tl.where(there, stops - tiles, total)
    num_runs = tl.minimum(most_runs, tl.cdiv(tl.sum(tiles, 0), LEAST))
    index = tl.program_id(0)
    if index < most_runs:
        run = tl.minimum(index, num_runs - 1).to(tl.int64)
        first, last = (run * total // num_runs).to(tl.int32), ((run + 1) * total // num_runs).to(tl.int32)
        sequence = tl.sum((stops <= first).to(tl.int32), 0)
        # Before the first one where the run has no tiles at all.
        final = tl.where(index < num_runs, tl.sum((begins < last).to(tl.int32), 0) - 1, -1)
        at = runs_ptr + index * 4
        tl.store(at, sequence)
        tl.store(at + 1, final)
        tl.store(at + 2, tl.maximum(first - tl.sum(tl.where(each == sequence, begins, 0), 0), 0))
        until = tl.minimum(last, tl.sum(tl.where(each == final, stops, 0), 0).to(tl.int32))
        tl.store(at + 3, until - tl.sum(tl.where(each == final, begins, 0), 0))
    else:
        sequence = index - most_runs
        begin = tl.sum(tl.where(each == sequence, begins, 0), 0).to(tl.int64)
        stop = tl.sum(tl.where(each == sequence, stops, 0), 0).to(tl.int64)
        at = bounds_ptr + sequence * 2
        # The last run that starts at a tile or before is the one that has it.
        tl.store(at, (((begin + 1) * num_runs - 1) // total).to(tl.int32))
        tl.store(at + 1, ((stop * num_runs - 1) // total).to(tl.int32))


@triton.jit(do_not_specialize=["layer", "num_layers"])
def _decode(
    q_ptr,
    q_stride,
    q_head_stride,
    rope_ptr,
    rope_stride,
    rope_head_stride,
    pages_ptr,
    table_ptr,
    table_stride,
    positions_ptr,
    runs_ptr,
    parts_ptr,
    lse_ptr,
    out_ptr,
    layer,
    num_layers,
    scale,
    NUM_HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    follow()
    run = tl.program_id(0)
    sequence, final = tl.load(runs_ptr + run * 4).to(tl.int64), tl.load(runs_ptr + run * 4 + 1).to(tl.int64)
    first, last = tl.load(runs_ptr + run * 4 + 2), tl.load(runs_ptr + run * 4 + 3)
    heads = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = heads < NUM_HEADS
    features, turned, tokens = tl.arange(0, LATENT), tl.arange(0, ROPE), tl.arange(0, TILE)
    tiles_per_block: tl.constexpr = BLOCK_SIZE // TILE
    row: tl.constexpr = LATENT + ROPE
    for index in range(sequence, final + 1):
        length = (tl.load(positions_ptr + index) + 1).to(tl.int32)
        num_tiles = tl.cdiv(length, TILE)
        low, high = tl.where(index == sequence, first, 0), tl.where(index == final, last, num_tiles)
        q = tl.load(
            q_ptr + index * q_stride + heads[:, None] * q_head_stride + features[None, :],
            mask=valid[:, None],
            other=0.0,
        )
        q_rope = tl.load(
            rope_ptr + index * rope_stride + heads[:, None] * rope_head_stride + turned[None, :],
            mask=valid[:, None],
            other=0.0,
        )
        best = tl.full([ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, LATENT], tl.float32)
        row_of_table = table_ptr + index * table_stride
        ahead = tl.load(row_of_table + low // tiles_per_block).to(tl.int64)
        for tile in range(low, high):
            block = ahead
            # One tile ahead: a load that waits for another one in its own round is not pipelined.
            ahead = tl.load(row_of_table + tl.minimum(tile + 1, high - 1) // tiles_per_block).to(tl.int64)
            at = pages_ptr + ((block * num_layers + layer) * BLOCK_SIZE + tile % tiles_per_block * TILE) * row
            seen = tile * TILE + tokens < length
            latents = tl.load(at + tokens[:, None] * row + features[None, :], mask=seen[:, None], other=0.0)
            rope = tl.load(at + tokens[:, None] * row + LATENT + turned[None, :])
            best, weight, acc = attend_tile(q, q_rope, latents, rope, seen, scale, best, weight, acc)
        if high - low == num_tiles:
            at_out = out_ptr + (index * NUM_HEADS + heads[:, None]) * LATENT + features[None, :]
            tl.store(at_out, (acc / weight[:, None]).to(out_ptr.dtype.element_ty), mask=valid[:, None])
        else:
            # Runs and sequences only grow, together: no two parts have one sum.
            part = (run + index) * NUM_HEADS + heads
            store_part(parts_ptr, lse_ptr, part, valid, True, best, weight, acc, LATENT, ROWS)


@triton.jit
def _merge(
    parts_ptr,
    lse_ptr,
    bounds_ptr,
    out_ptr,
    NUM_HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    FEATURES: tl.constexpr,
    RUNS: tl.constexpr,
):
    follow()
    sequence, head = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(bounds_ptr + sequence * 2), tl.load(bounds_ptr + sequence * 2 + 1)
    if first == last:
        return
    runs, features = tl.arange(0, RUNS), tl.program_id(2) * FEATURES + tl.arange(0, FEATURES)
    best = tl.full([1], float("-inf"), tl.float32)
    weight = tl.zeros([1], tl.float32)
    acc = tl.zeros([FEATURES], tl.float32)
    for start in range(first, last + 1, RUNS):
        there = start + runs <= last
        parts = (start + runs + sequence).to(tl.int64) * NUM_HEADS + head
        lse = tl.load(lse_ptr + parts, mask=there, other=float("-inf"))
        values = tl.load(parts_ptr + parts[:, None] * LATENT + features[None, :], mask=there[:, None], other=0.0)
        new_best = tl.maximum(best, tl.max(lse, 0))
        shares, shrink = tl.exp2(lse - new_best), tl.exp2(best - new_best)
        weight = weight * shrink + tl.sum(shares, 0)
        acc = acc * shrink + tl.sum(values * shares[:, None], 0)
        best = new_best
    at_out = out_ptr + (sequence.to(tl.int64) * NUM_HEADS + head) * LATENT + features
    tl.store(at_out, (acc / weight).to(out_ptr.dtype.element_ty))


_launch_cut, _launch_decode, _launch_merge = Launcher(_cut), Launcher(_decode), Launcher(_merge)


class ContextRuns(NamedTuple):
    """How the contexts of a step are cut, for all its layers."""

    positions: Tensor  # [B]
    runs: Tensor  # [runs, 4] int32: first and last sequence, a run's first tile of the one and end in the other
    bounds: Tensor  # [B, 2] int32: the first run of each sequence, and the last
    tactic: LatentTactic


def cut_contexts(positions: Tensor, num_heads: int, tactic: LatentTactic) -> ContextRuns:
    """positions [B] of the query tokens, which see what is up to and including them."""
    count = len(positions)
    programs = max(tactic.programs // -(-num_heads // MAX_HEADS), 1)
    # As many for each sequence, where that is about as many: they would be cut there if all were equally long.
    aligned = programs // count * count or count // -(-count // programs)
    most_runs = aligned if 10 * aligned >= 9 * programs else programs
    runs = torch.empty(most_runs, 4, dtype=torch.int32, device=positions.device)
    bounds = torch.empty(count, 2, dtype=torch.int32, device=positions.device)
    arguments = (positions, count, most_runs, runs, bounds)
    extra = _EXTRA_TOKENS // tactic.tile
    constants = {"TILE": tactic.tile, "LEAST": max(_LEAST_TOKENS // tactic.tile, 1)}
    constants |= {"BEFORE": extra // 2, "BEHIND": extra - extra // 2, "SEQUENCES": max(power_of_two(count), 64)}
    _launch_cut((most_runs + count, 1, 1), arguments, constants, num_warps=2)
    return ContextRuns(positions, runs, bounds, tactic)


def latent_decode(
    q: Tensor,
    q_rope: Tensor,
    pages: Tensor,
    block_table: Tensor,
    layer: int,
    scale: float,
    cut: ContextRuns,
) -> Tensor:
    """q [B, H, L] in latent space, q_rope [B, H, R] (any strides of B and H), pages [blocks, layers, S, L + R],
    block_table [B, M], contexts as they are cut -> [B, H, L]. Each sees the tokens up to and including itself.
    """
    num_sequences, num_heads, latent = q.shape
    _, num_layers, block_size, row = pages.shape
    positions, runs, bounds, tactic = cut
    rows = min(max(16, power_of_two(num_heads)), MAX_HEADS)
    num_parts = len(runs) + num_sequences - 1
    out = torch.empty(num_sequences, num_heads, latent, dtype=q.dtype, device=q.device)
    parts = torch.empty(num_parts, num_heads, latent, dtype=torch.float32, device=q.device)
    lse = torch.empty(num_parts, num_heads, dtype=torch.float32, device=q.device)
    arguments = (
        q,
        q.stride(0),
        q.stride(1),
        q_rope,
        q_rope.stride(0),
        q_rope.stride(1),
        pages,
        block_table,
        block_table.stride(0),
        positions,
        runs,
        parts,
        lse,
        out,
        layer,
        num_layers,
        scale * LOG2_E,
    )
    constants = {
        "NUM_HEADS": num_heads,
        "LATENT": latent,
        "ROPE": row - latent,
        "BLOCK_SIZE": block_size,
        "TILE": tactic.tile,
        "ROWS": rows,
    }
    _launch_decode(
        (len(runs), -(-num_heads // rows), 1),
        arguments,
        constants,
        num_warps=tactic.warps,
        num_stages=tactic.stages,
    )
    features = latent // 4 if num_sequences * num_heads <= _FEW else latent
    at_once = min(max(power_of_two(-(-len(runs) // num_sequences)), 2), _MOST_AT_ONCE)
    constants = {"NUM_HEADS": num_heads, "LATENT": latent, "FEATURES": features, "RUNS": at_once}
    grid = (num_sequences, num_heads, latent // features)
    _launch_merge(grid, (parts, lse, bounds, out), constants, num_warps=4)
    return out

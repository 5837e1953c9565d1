"""Attention of one query token per sequence over latent rows, in Triton. Reference: workers.attention.mla_reference.

All heads share the rows, so that a row is read once for up to 64 of them. All contexts, one behind the other, are cut
into equal runs of tiles, one for each program, so that the longest context is nobody's alone. A context of several runs
is merged by a second launch. Shapes: B sequences, H heads, L latent size, R rotary size, S block size, M blocks of the
longest.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.kernels.launcher import Launcher, power_of_two
from workers.kernels.paged_decode import LOG2_E
from workers.kernels.tactics import LatentTactic

MAX_HEADS = 64  # of one program
_LEAST_TOKENS = 64  # of a run, unless a tile is larger
_RUNS = 8  # that are merged at a time


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


@triton.jit
def _num_tiles(positions_ptr, num_sequences, TILE: tl.constexpr, SEQUENCES: tl.constexpr):
    """Of each context, [SEQUENCES] int32; and how many up to its end."""
    each = tl.arange(0, SEQUENCES)
    # Behind the last one: no tokens.
    positions = tl.load(positions_ptr + each, mask=each < num_sequences, other=-1)
    tiles = tl.cdiv((positions + 1).to(tl.int32), TILE)
    return tiles, tl.cumsum(tiles, 0)


@triton.jit
def _num_runs(most, total, LEAST: tl.constexpr):
    """Each of LEAST tiles or more, or all that there are."""
    return tl.minimum(most, tl.cdiv(total, LEAST))


@triton.jit
def _start(run, num_runs, total):
    """Its first tile of all."""
    return (run.to(tl.int64) * total // num_runs).to(tl.int32)


@triton.jit
def _run_of(tile, num_runs, total):
    """Inverse of `_start`: the last run that starts at this tile or before."""
    return (((tile + 1).to(tl.int64) * num_runs - 1) // total).to(tl.int32)


@triton.jit(do_not_specialize=["num_sequences", "layer", "num_layers"])
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
    num_sequences,
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
    LEAST: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr,
):
    gdc_launch_dependents()
    # No kernel of a step writes positions: they can be read before the one ahead has ended.
    tiles, ends = _num_tiles(positions_ptr, num_sequences, TILE, SEQUENCES)
    total = tl.sum(tiles, 0)
    run, num_runs = tl.program_id(0), _num_runs(tl.num_programs(0), total, LEAST)
    if run >= num_runs:
        return
    first, last = _start(run, num_runs, total), _start(run + 1, num_runs, total)
    sequence, final = tl.sum((ends <= first).to(tl.int64), 0), tl.sum((ends < last).to(tl.int64), 0)
    begin = tl.sum(tl.where(ends <= first, tiles, 0), 0)
    gdc_wait()
    heads = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = heads < NUM_HEADS
    features, turned, tokens = tl.arange(0, LATENT), tl.arange(0, ROPE), tl.arange(0, TILE)
    tiles_per_block: tl.constexpr = BLOCK_SIZE // TILE
    row: tl.constexpr = LATENT + ROPE
    for index in range(sequence, final + 1):
        length = (tl.load(positions_ptr + index) + 1).to(tl.int32)
        num_tiles = tl.cdiv(length, TILE)
        low, high = tl.maximum(first - begin, 0), tl.minimum(last - begin, num_tiles)
        begin += num_tiles
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


@triton.jit(do_not_specialize=["num_sequences", "most_runs"])
def _merge(
    parts_ptr,
    lse_ptr,
    positions_ptr,
    num_sequences,
    most_runs,
    out_ptr,
    LATENT: tl.constexpr,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    SEQUENCES: tl.constexpr,
    RUNS: tl.constexpr,
):
    gdc_launch_dependents()
    tiles, _ = _num_tiles(positions_ptr, num_sequences, TILE, SEQUENCES)
    total = tl.sum(tiles, 0)
    num_runs = _num_runs(most_runs, total, LEAST)
    sequence, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    before = tl.arange(0, SEQUENCES) < sequence
    begin = tl.sum(tl.where(before, tiles, 0), 0)
    end = begin + tl.sum(tl.where(tl.arange(0, SEQUENCES) == sequence, tiles, 0), 0)
    first, last = _run_of(begin, num_runs, total), _run_of(end - 1, num_runs, total)
    gdc_wait()  # all do: who follows sees what is whole already as late as what is merged
    if first == last:
        return
    runs, features = tl.arange(0, RUNS), tl.arange(0, LATENT)
    best = tl.full([1], float("-inf"), tl.float32)
    weight = tl.zeros([1], tl.float32)
    acc = tl.zeros([LATENT], tl.float32)
    for start in range(first, last + 1, RUNS):
        there = start + runs <= last
        parts = (start + runs + sequence).to(tl.int64) * num_heads + head
        lse = tl.load(lse_ptr + parts, mask=there, other=float("-inf"))
        values = tl.load(parts_ptr + parts[:, None] * LATENT + features[None, :], mask=there[:, None], other=0.0)
        new_best = tl.maximum(best, tl.max(lse, 0))
        shares, shrink = tl.exp2(lse - new_best), tl.exp2(best - new_best)
        weight = weight * shrink + tl.sum(shares, 0)
        acc = acc * shrink + tl.sum(values * shares[:, None], 0)
        best = new_best
    at_out = out_ptr + (sequence.to(tl.int64) * num_heads + head) * LATENT + features
    tl.store(at_out, (acc / weight).to(out_ptr.dtype.element_ty))


_launch_decode, _launch_merge = Launcher(_decode), Launcher(_merge)


def latent_decode(
    q: Tensor,
    q_rope: Tensor,
    pages: Tensor,
    block_table: Tensor,
    positions: Tensor,
    layer: int,
    scale: float,
    tactic: LatentTactic,
) -> Tensor:
    """q [B, H, L] in latent space, q_rope [B, H, R] (any strides of B and H), pages [blocks, layers, S, L + R],
    block_table [B, M], positions [B] of the query tokens -> [B, H, L]. Each sees the tokens up to and including itself.

    positions are not written by a kernel that is launched as this one.
    """
    num_sequences, num_heads, latent = q.shape
    _, num_layers, block_size, row = pages.shape
    rows = min(max(16, power_of_two(num_heads)), MAX_HEADS)
    groups = -(-num_heads // rows)
    most_runs = max(tactic.programs // groups, 1)
    num_parts = most_runs + num_sequences - 1
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
        num_sequences,
        parts,
        lse,
        out,
        layer,
        num_layers,
        scale * LOG2_E,
    )
    cut = {
        "TILE": tactic.tile,
        "LEAST": max(_LEAST_TOKENS // tactic.tile, 1),
        "SEQUENCES": max(power_of_two(num_sequences), 64),
    }
    sizes = {"NUM_HEADS": num_heads, "LATENT": latent, "ROPE": row - latent, "BLOCK_SIZE": block_size}
    _launch_decode(
        (most_runs, groups, 1),
        arguments,
        {**sizes, **cut, "ROWS": rows},
        num_warps=tactic.warps,
        num_stages=tactic.stages,
    )
    arguments = (parts, lse, positions, num_sequences, most_runs, out)
    _launch_merge((num_sequences, num_heads, 1), arguments, {"LATENT": latent, **cut, "RUNS": _RUNS}, num_warps=4)
    return out

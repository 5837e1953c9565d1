"""Attention of one query token per sequence over latent rows, in Triton. Reference: workers.attention.mla_reference.

All heads share the rows, so that a row is read once for up to 64 of them. Contexts are cut as `context_runs` says.
Shapes: B sequences, H heads, L latent size, R rotary size, S block size, M blocks of the longest.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.kernels.context_runs import ContextRuns, merge_runs
from workers.kernels.launcher import Launcher, power_of_two
from workers.kernels.paged_decode import LOG2_E

MAX_HEADS = 64  # of one program


def programs_of(num_heads: int) -> int:
    """Of one run."""
    return -(-num_heads // MAX_HEADS)


@triton.jit
def attend_tile(q, q_rope, latents, rope, seen, scale, best, total, acc):
    """One more tile of rows: latents and rope of those that are `seen`. q, latents and acc are tuples, of all features
    or of as many pieces of them: sums over a piece do not wait for those over others. Returns best, total and acc."""
    if len(q) == 1:
        scores = tl.dot(q_rope, tl.trans(rope), tl.dot(q[0], tl.trans(latents[0]))) * scale
    else:
        scores = tl.dot(q_rope, tl.trans(rope)) * scale
        for i in tl.static_range(len(q)):
            # Scaled one by one: a sum of products alone becomes one product, in which each waits for the last.
            scores += tl.dot(q[i], tl.trans(latents[i])) * scale
    scores = tl.where(seen[None, :], scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - new_best[:, None])
    shrink = tl.exp2(best - new_best)
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(rope.dtype)
    shrink = shrink[:, None]
    if len(q) == 1:
        acc = (acc[0] * shrink + tl.dot(weights, latents[0]),)
    else:
        acc = [acc[each] * shrink + tl.dot(weights, latents[each]) for each in (0, 1, 2, 3)]
    return new_best, total, acc


@triton.jit
def store_part(parts_ptr, lse_ptr, part, valid, saw_any, best, total, acc, LATENT: tl.constexpr, ROWS: tl.constexpr):
    """Of a run of a context, for `merge_splits`. acc: as of `attend_tile`."""
    if saw_any:
        piece: tl.constexpr = LATENT // len(acc)
        at = parts_ptr + part[:, None] * LATENT + tl.arange(0, piece)[None, :]
        for i in tl.static_range(len(acc)):
            tl.store(at + i * piece, acc[i] / total[:, None], mask=valid[:, None])
        tl.store(lse_ptr + part, best + tl.log2(total), mask=valid)
    else:
        tl.store(lse_ptr + part, tl.full([ROWS], float("-inf"), tl.float32), mask=valid)


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
    PIECES: tl.constexpr,  # 1 or 4
):
    gdc_launch_dependents()
    run = tl.program_id(0)
    sequence, final = tl.load(runs_ptr + run * 4).to(tl.int64), tl.load(runs_ptr + run * 4 + 1).to(tl.int64)
    first, last = tl.load(runs_ptr + run * 4 + 2), tl.load(runs_ptr + run * 4 + 3)
    heads = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = heads < NUM_HEADS
    piece: tl.constexpr = LATENT // PIECES
    which = (0,) if PIECES == 1 else (0, 1, 2, 3)
    features, turned, tokens = tl.arange(0, piece), tl.arange(0, ROPE), tl.arange(0, TILE)
    tiles_per_block: tl.constexpr = BLOCK_SIZE // TILE
    row: tl.constexpr = LATENT + ROPE
    some = sequence <= final
    length = (tl.load(positions_ptr + sequence, mask=some, other=0) + 1).to(tl.int32)
    ahead = tl.load(table_ptr + sequence * table_stride + first // tiles_per_block, mask=some, other=0).to(tl.int64)
    gdc_wait()  # see ContextRuns: where a run begins was known before
    for index in range(sequence, final + 1):
        # What the next context begins with is asked for now: later, three loads would wait for each other.
        following = tl.minimum(index + 1, final)
        next_position = tl.load(positions_ptr + following)
        next_block = tl.load(table_ptr + following * table_stride)
        num_tiles = tl.cdiv(length, TILE)
        low, high = tl.where(index == sequence, first, 0), tl.where(index == final, last, num_tiles)
        q_at = q_ptr + index * q_stride + heads[:, None] * q_head_stride + features[None, :]
        q = [tl.load(q_at + each * piece, mask=valid[:, None], other=0.0) for each in which]
        q_rope = tl.load(
            rope_ptr + index * rope_stride + heads[:, None] * rope_head_stride + turned[None, :],
            mask=valid[:, None],
            other=0.0,
        )
        best = tl.full([ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        acc = [tl.zeros([ROWS, piece], tl.float32) for each in which]
        row_of_table = table_ptr + index * table_stride
        for tile in range(low, high):
            block = ahead
            # One tile ahead: a load that waits for another one in its own round is not pipelined.
            ahead = tl.load(row_of_table + tl.minimum(tile + 1, high - 1) // tiles_per_block).to(tl.int64)
            at = pages_ptr + ((block * num_layers + layer) * BLOCK_SIZE + tile % tiles_per_block * TILE) * row
            seen = tile * TILE + tokens < length
            rows_at = at + tokens[:, None] * row
            latents = [
                tl.load(rows_at + each * piece + features[None, :], mask=seen[:, None], other=0.0) for each in which
            ]
            rope = tl.load(rows_at + LATENT + turned[None, :])
            best, weight, acc = attend_tile(q, q_rope, latents, rope, seen, scale, best, weight, acc)
        if high - low == num_tiles:
            at_out = out_ptr + (index * NUM_HEADS + heads[:, None]) * LATENT + features[None, :]
            for i in tl.static_range(PIECES):
                seen_of_all = acc[i] / weight[:, None]
                tl.store(at_out + i * piece, seen_of_all.to(out_ptr.dtype.element_ty), mask=valid[:, None])
        else:
            # Runs and sequences only grow, together: no two parts have one sum.
            part = (run + index) * NUM_HEADS + heads
            store_part(parts_ptr, lse_ptr, part, valid, True, best, weight, acc, LATENT, ROWS)
        length = (next_position + 1).to(tl.int32)
        ahead = next_block.to(tl.int64)


_launch_decode = Launcher(_decode)


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
    positions, runs, tactic = cut.positions, cut.runs, cut.tactic
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
        "PIECES": tactic.pieces if latent % 64 == 0 else 1,
    }
    _launch_decode(
        (len(runs), -(-num_heads // rows), 1),
        arguments,
        constants,
        num_warps=tactic.warps,
        num_stages=tactic.stages,
    )
    merge_runs(parts, lse, out, cut)
    return out

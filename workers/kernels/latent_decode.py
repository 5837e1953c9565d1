"""Attention of one query token per sequence over latent rows, in Triton. Reference: workers.attention.mla_reference.

All heads share the rows, so that a row is read once for up to 64 of them. Runs of a context and their merge are those
of `paged_decode`. Shapes: B sequences, H heads, L latent size, R rotary size, S block size, M blocks of the longest.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow
from workers.kernels.launcher import Launcher, power_of_two
from workers.kernels.paged_decode import LOG2_E
from workers.kernels.split_merge import Parts
from workers.kernels.tactics import DecodeTactic

MAX_HEADS = 64  # of one program


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
    parts_ptr,
    lse_ptr,
    out_ptr,
    out_stride,
    layer,
    num_layers,
    scale,
    NUM_HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    follow()
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    length = (tl.load(positions_ptr + sequence) + 1).to(tl.int32)
    num_tiles = tl.cdiv(length, TILE)
    per_split = tl.cdiv(num_tiles, SPLITS)
    first, last = split * per_split, tl.minimum((split + 1) * per_split, num_tiles)
    heads = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = heads < NUM_HEADS
    features, turned, tokens = tl.arange(0, LATENT), tl.arange(0, ROPE), tl.arange(0, TILE)
    q = tl.load(
        q_ptr + sequence * q_stride + heads[:, None] * q_head_stride + features[None, :], mask=valid[:, None], other=0.0
    )
    q_rope = tl.load(
        rope_ptr + sequence * rope_stride + heads[:, None] * rope_head_stride + turned[None, :],
        mask=valid[:, None],
        other=0.0,
    )
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, LATENT], tl.float32)
    tiles_per_block: tl.constexpr = BLOCK_SIZE // TILE
    row: tl.constexpr = LATENT + ROPE
    row_of_table = table_ptr + sequence * table_stride
    ahead = tl.load(row_of_table + tl.minimum(first, num_tiles - 1) // tiles_per_block).to(tl.int64)
    for tile in range(first, last):
        block = ahead
        # One tile ahead: a load that waits for another one in its own round is not pipelined.
        ahead = tl.load(row_of_table + tl.minimum(tile + 1, last - 1) // tiles_per_block).to(tl.int64)
        at = pages_ptr + ((block * num_layers + layer) * BLOCK_SIZE + tile % tiles_per_block * TILE) * row
        seen = tile * TILE + tokens < length
        latents = tl.load(at + tokens[:, None] * row + features[None, :], mask=seen[:, None], other=0.0)
        rope = tl.load(at + tokens[:, None] * row + LATENT + turned[None, :])
        best, total, acc = attend_tile(q, q_rope, latents, rope, seen, scale, best, total, acc)
    if SPLITS == 1:
        at_out = out_ptr + sequence * out_stride + heads[:, None] * LATENT + features[None, :]
        tl.store(at_out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=valid[:, None])
    else:
        part = (sequence * NUM_HEADS + heads) * SPLITS + split
        store_part(parts_ptr, lse_ptr, part, valid, first < last, best, total, acc, LATENT, ROWS)


_launch_decode = Launcher(_decode)


def latent_decode(
    q: Tensor,
    q_rope: Tensor,
    pages: Tensor,
    block_table: Tensor,
    positions: Tensor,
    layer: int,
    scale: float,
    tactic: DecodeTactic,
) -> Tensor | Parts:
    """q [B, H, L] in latent space, q_rope [B, H, R] (any strides of B and H), pages [blocks, layers, S, L + R],
    block_table [B, M], positions [B] of the query tokens -> [B, H, L], or its runs. Each sees the tokens up to and
    including itself.
    """
    num_sequences, num_heads, latent = q.shape
    _, num_layers, block_size, row = pages.shape
    splits, rows = tactic.splits, min(max(16, power_of_two(num_heads)), MAX_HEADS)
    if splits > 1:
        parts = torch.empty(num_sequences, num_heads, splits, latent, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_sequences, num_heads, splits, dtype=torch.float32, device=q.device)
        out = parts
    else:
        parts = lse = out = torch.empty(num_sequences, num_heads, latent, dtype=q.dtype, device=q.device)
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
        parts,
        lse,
        out,
        out.stride(0),
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
        "SPLITS": splits,
        "ROWS": rows,
    }
    _launch_decode(
        (num_sequences, -(-num_heads // rows), splits),
        arguments,
        constants,
        num_warps=tactic.warps,
        num_stages=tactic.stages,
    )
    return Parts(parts, lse) if splits > 1 else out

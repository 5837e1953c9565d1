"""Attention of each query over latent rows of its own choice, in Triton. Reference: workers.attention.sparse.

Rows are gathered one by one, as if pages held one token; up to 64 heads share what is read. Runs of a choice and their
merge are those of `latent_decode`. Nothing is planned: how many rows are valid is read on the device.

Shapes: P queries, K chosen rows of each, H heads, L latent size, R rotary size, S block size.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow
from workers.kernels.latent_decode import MAX_HEADS, attend_tile, store_part
from workers.kernels.launcher import Launcher, power_of_two
from workers.kernels.paged_decode import LOG2_E
from workers.kernels.split_merge import merge_splits
from workers.kernels.tactics import DecodeTactic


@triton.jit
def _attend(
    q_ptr,
    q_stride,
    q_head_stride,
    rope_ptr,
    rope_stride,
    rope_head_stride,
    rows_ptr,
    chosen_ptr,
    lengths_ptr,
    parts_ptr,
    lse_ptr,
    out_ptr,
    scale,
    NUM_HEADS: tl.constexpr,
    CHOSEN: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    ONLY_SHORT: tl.constexpr,
):
    follow()
    groups: tl.constexpr = (NUM_HEADS + ROWS - 1) // ROWS
    query, split = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(1)
    length = tl.minimum(tl.load(lengths_ptr + query), CHOSEN).to(tl.int32)
    if ONLY_SHORT and length == CHOSEN:
        return
    num_tiles = tl.cdiv(length, TILE)
    per_split = tl.cdiv(num_tiles, SPLITS)
    first, last = split * per_split, tl.minimum((split + 1) * per_split, num_tiles)
    heads = tl.program_id(0) % groups * ROWS + tl.arange(0, ROWS)
    valid = heads < NUM_HEADS
    features, turned, tokens = tl.arange(0, LATENT), tl.arange(0, ROPE), tl.arange(0, TILE)
    q = tl.load(
        q_ptr + query * q_stride + heads[:, None] * q_head_stride + features[None, :], mask=valid[:, None], other=0.0
    )
    q_rope = tl.load(
        rope_ptr + query * rope_stride + heads[:, None] * rope_head_stride + turned[None, :],
        mask=valid[:, None],
        other=0.0,
    )
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = (tl.zeros([ROWS, LATENT], tl.float32),)
    row: tl.constexpr = LATENT + ROPE
    choice = chosen_ptr + query * CHOSEN
    ahead = tl.load(choice + first * TILE + tokens, mask=first * TILE + tokens < length, other=-1)
    for tile in range(first, last):
        slots = ahead
        # One tile ahead: a load that waits for another one in its own round is not pipelined.
        following = (tile + 1) * TILE + tokens
        ahead = tl.load(choice + following, mask=following < length, other=-1)
        seen = slots >= 0
        at = rows_ptr + slots.to(tl.int64) * row
        latents = tl.load(at[:, None] + features[None, :], mask=seen[:, None], other=0.0)
        rope = tl.load(at[:, None] + LATENT + turned[None, :], mask=seen[:, None], other=0.0)
        best, total, acc = attend_tile((q,), q_rope, (latents,), rope, seen, scale, best, total, acc)
    if SPLITS == 1:
        at_out = out_ptr + (query * NUM_HEADS + heads[:, None]) * LATENT + features[None, :]
        tl.store(at_out, (acc[0] / total[:, None]).to(out_ptr.dtype.element_ty), mask=valid[:, None])
    else:
        part = (query * NUM_HEADS + heads) * SPLITS + split
        store_part(parts_ptr, lse_ptr, part, valid, first < last, best, total, acc, LATENT, ROWS)


_launch_attend = Launcher(_attend)


def sparse_latents(
    q: Tensor,
    q_rope: Tensor,
    pages: Tensor,
    chosen: Tensor,
    lengths: Tensor,
    layer: int,
    scale: float,
    tactic: DecodeTactic,
    out: Tensor | None = None,
    *,
    only_short: bool = False,
) -> Tensor:
    """q [P, H, L] in latent space, q_rope [P, H, R] (any strides of P and H), pages [blocks, layers, S, L + R],
    chosen int32 [P, K]: rows of layer 0 in pages seen as [blocks * layers * S, L + R], the first min(lengths [P], K)
    of each valid, one at least -> [P, H, L].

    Into `out`, if given; with `only_short` only of queries with fewer than K valid rows, the others stay as they are.
    """
    num_queries, num_heads, latent = q.shape
    _, _, block_size, row = pages.shape
    splits, rows = tactic.splits, min(max(16, power_of_two(num_heads)), MAX_HEADS)
    if out is None:
        out = torch.empty(num_queries, num_heads, latent, dtype=q.dtype, device=q.device)
    assert out.is_contiguous(), "queries lie side by side"
    parts = lse = out
    if splits > 1:
        parts = torch.empty(num_queries, num_heads, splits, latent, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_queries, num_heads, splits, dtype=torch.float32, device=q.device)
    arguments = (
        q,
        q.stride(0),
        q.stride(1),
        q_rope,
        q_rope.stride(0),
        q_rope.stride(1),
        pages.view(-1, row)[layer * block_size :],
        chosen,
        lengths,
        parts,
        lse,
        out,
        scale * LOG2_E,
    )
    constants = {
        "NUM_HEADS": num_heads,
        "CHOSEN": chosen.shape[1],
        "LATENT": latent,
        "ROPE": row - latent,
        "TILE": tactic.tile,
        "SPLITS": splits,
        "ROWS": rows,
        "ONLY_SHORT": only_short,
    }
    _launch_attend(
        (num_queries * -(-num_heads // rows), splits, 1),
        arguments,
        constants,
        num_warps=tactic.warps,
        num_stages=tactic.stages,
    )
    if splits > 1:
        merge_splits(parts, lse, out, lengths if only_short else None, chosen.shape[1])
    return out

"""What lies between a projection and attention, in one pass each, in Triton: norms of heads, rotation, and the write
into the paged cache. References: Rotation, RmsNorm, LatentAttention of workers.layers.

Shapes: T tokens, H query heads, K key/value heads, D head size, N unrotated and R rotated features of a query head,
S block size. Rotation is computed in fp32. Offsets into the cache are 64-bit.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow
from workers.kernels.launcher import Launcher, power_of_two
from workers.kernels.norms import MANY_ROWS, PendingNorm, norm_factor

_HEADS = 8  # that one program rotates
_PENDING_HEADS = 16  # if it reads the row whose norm is pending, too
_MOST_HEADS = 64  # the same, of many rows


class RotationTable(NamedTuple):
    """Of all positions of a model, each fp32 [positions, D / 2] (R / 2 for latents)."""

    cos: Tensor
    sin: Tensor


@triton.jit(do_not_specialize=["layer", "num_layers"])
def _rotate_heads(
    qkv_ptr,
    qkv_stride,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_weight_ptr,
    k_weight_ptr,
    pages_ptr,
    slots_ptr,
    layer,
    num_layers,
    eps,
    rows_ptr,
    row_size,
    row_eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    PENDING: tl.constexpr,  # a power of two from `row_size` on; 0: no norm is pending
):
    follow()
    token = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if PENDING:
        factor = norm_factor(rows_ptr + token * row_size, row_size, row_eps, PENDING)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half: tl.constexpr = DIM // 2
    features = tl.arange(0, half)
    exists = (heads < NUM_HEADS + 2 * NUM_KV)[:, None]
    rotated = heads < NUM_HEADS + NUM_KV
    left_ptr = qkv_ptr + token * qkv_stride + heads[:, None] * DIM + features[None, :]
    left = tl.load(left_ptr, mask=exists, other=0.0)
    right = tl.load(left_ptr + half, mask=exists, other=0.0)
    dtype = left.dtype
    x, y = left.to(tl.float32) * factor, right.to(tl.float32) * factor
    if PENDING:
        left, right = x.to(dtype), y.to(dtype)
    if NORM:
        scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / DIM + eps)[:, None]
        is_query = (heads < NUM_HEADS)[:, None]
        weight_x = tl.where(
            is_query, tl.load(q_weight_ptr + features)[None, :], tl.load(k_weight_ptr + features)[None, :]
        ).to(tl.float32)
        weight_y = tl.where(
            is_query, tl.load(q_weight_ptr + half + features)[None, :], tl.load(k_weight_ptr + half + features)[None, :]
        ).to(tl.float32)
        x = ((x * scale).to(dtype).to(tl.float32) * weight_x).to(dtype).to(tl.float32)
        y = ((y * scale).to(dtype).to(tl.float32) * weight_y).to(dtype).to(tl.float32)
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_ptr + position * half + features)[None, :]
    sin = tl.load(sin_ptr + position * half + features)[None, :]
    new_left = tl.where(rotated[:, None], (x * cos - y * sin).to(dtype), left)
    new_right = tl.where(rotated[:, None], (y * cos + x * sin).to(dtype), right)
    in_place = exists if PENDING else exists & rotated[:, None]
    tl.store(left_ptr, new_left, mask=in_place)
    tl.store(left_ptr + half, new_right, mask=in_place)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    # Pages are [2, K, S, D], keys first: the heads behind the queries lie as they are numbered.
    page = (slot // BLOCK_SIZE * num_layers + layer) * (2 * NUM_KV * BLOCK_SIZE * DIM)
    cached = heads - NUM_HEADS
    at = pages_ptr + page + (cached[:, None] * BLOCK_SIZE + slot % BLOCK_SIZE) * DIM + features[None, :]
    tl.store(at, new_left, mask=exists & (cached >= 0)[:, None])
    tl.store(at + half, new_right, mask=exists & (cached >= 0)[:, None])


_launch_rotate_heads = Launcher(_rotate_heads)


def rotate_heads(
    qkv: Tensor,
    rotation: RotationTable,
    positions: Tensor,
    norms: tuple[Tensor, Tensor, float] | None,
    pages: Tensor,
    slots: Tensor,
    layer: int,
    num_heads: int,
    pending: PendingNorm | None = None,
) -> None:
    """qkv [T, (H + 2 K) D], made of `pending` [T, d] or of normed rows: queries and keys are normed (with `norms`:
    weights [D] of both, eps) and rotated half-split in place; keys and values are written to `pages`
    [blocks, layers, 2, K, S, D] at `slots` [T] of `layer`.

    positions [T] int64.
    """
    _, num_layers, _, num_kv, block_size, dim = pages.shape
    q_weight, k_weight, eps = norms or (rotation.cos, rotation.cos, 0.0)
    arguments = (
        qkv,
        qkv.stride(0),
        rotation.cos,
        rotation.sin,
        positions,
        q_weight,
        k_weight,
        pages,
        slots,
        layer,
        num_layers,
        eps,
        *((qkv, 1, 0.0) if pending is None else (pending.rows, pending.rows.shape[1], pending.eps)),
    )
    heads = _HEADS
    if pending is not None:
        heads = _PENDING_HEADS
        if len(qkv) >= MANY_ROWS:
            heads = min(power_of_two(num_heads + 2 * num_kv), _MOST_HEADS)
    constants = {
        "NUM_HEADS": num_heads,
        "NUM_KV": num_kv,
        "DIM": dim,
        "BLOCK_SIZE": block_size,
        "NORM": norms is not None,
        "HEADS": heads,
        "PENDING": 0 if pending is None else power_of_two(pending.rows.shape[1]),
    }
    grid = (len(qkv), -(-(num_heads + 2 * num_kv) // heads), 1)
    _launch_rotate_heads(grid, arguments, constants, num_warps=4)


@triton.jit
def _join_keys(
    both_ptr,
    rope_ptr,
    rope_stride,
    keys_ptr,
    NUM_HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
):
    follow()
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    exists = (heads < NUM_HEADS)[:, None]
    features, turned = tl.arange(0, NOPE), tl.arange(0, ROPE)
    rows = token * NUM_HEADS + heads
    nope = tl.load(both_ptr + rows[:, None] * (NOPE + VALUE) + features[None, :], mask=exists, other=0.0)
    rope = tl.load(rope_ptr + token * rope_stride + turned)
    at = keys_ptr + rows[:, None] * (NOPE + ROPE)
    tl.store(at + features[None, :], nope, mask=exists)
    tl.store(at + NOPE + turned[None, :], tl.broadcast_to(rope[None, :], (HEADS, ROPE)), mask=exists)


_launch_join_keys = Launcher(_join_keys)


def join_keys(both: Tensor, rope: Tensor, nope: int) -> Tensor:
    """both [C, H, N + V], contiguous, rope [C, R] of any stride -> keys [C, H, N + R]. N and R are powers of two."""
    tokens, heads, width = both.shape
    keys = both.new_empty(tokens, heads, nope + rope.shape[1])
    arguments = (
        both,
        rope,
        rope.stride(0),
        keys,
    )
    constants = {
        "NUM_HEADS": heads,
        "NOPE": nope,
        "VALUE": width - nope,
        "ROPE": rope.shape[1],
        "HEADS": 2 * _HEADS,
    }
    _launch_join_keys((tokens, -(-heads // (2 * _HEADS)), 1), arguments, constants, num_warps=4)
    return keys

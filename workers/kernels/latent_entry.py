"""What lies between projections and attention over latents, in one pass, in Triton: rows are normed, rotated and put
into the cache, queries are rotated, and those of few tokens come into latent space beside, by a matrix of each head
that is read once. References: Rotation, RmsNorm, LatentAttention of workers.layers; torch.bmm.

Shapes: T tokens, A of them single (the first), H query heads, N unrotated and R rotated features of a query head,
L latent size, S block size. Rotation is computed in fp32. Offsets into the cache are 64-bit.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.kernels.launcher import Launcher, power_of_two
from workers.kernels.rotary import RotationTable

ENDS_ROWS = 256  # single tokens; for more, ways into latent space and out of it are products for cuBLAS
_HEADS = 16  # that one program rotates


@triton.jit
def _turn(
    token,
    part,
    q_ptr,
    q_stride,
    kv_ptr,
    kv_stride,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    weight_ptr,
    rows_ptr,
    slots_ptr,
    layer,
    num_layers,
    eps,
    NUM_HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Of one token: its row (part 0), or HEADS of its queries. Where it stands does not depend on the kernel before."""
    half: tl.constexpr = ROPE // 2
    pairs = tl.arange(0, half)
    position = tl.load(positions_ptr + token)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * half + pairs)
    sin = tl.load(sin_ptr + position * half + pairs)
    gdc_wait()
    if part == 0:
        features = tl.arange(0, LATENT)
        latent_ptr = kv_ptr + token * kv_stride + features
        latent = tl.load(latent_ptr)
        wide = latent.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide) / LATENT + eps)
        weight = tl.load(weight_ptr + features).to(tl.float32)
        normed = ((wide * scale).to(latent.dtype).to(tl.float32) * weight).to(latent.dtype)
        features_r = tl.arange(0, ROPE)
        rope_ptr = kv_ptr + token * kv_stride + LATENT + features_r
        even, odd = tl.split(tl.reshape(tl.load(rope_ptr).to(tl.float32), (half, 2)))
        turned = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (ROPE,)).to(latent.dtype)
        tl.store(latent_ptr, normed)
        tl.store(rope_ptr, turned)
        row = (slot // BLOCK_SIZE * num_layers + layer) * BLOCK_SIZE + slot % BLOCK_SIZE
        row_ptr = rows_ptr + row * (LATENT + ROPE)
        tl.store(row_ptr + features, normed)
        tl.store(row_ptr + LATENT + features_r, turned)
    else:
        heads = (part - 1) * HEADS + tl.arange(0, HEADS)
        exists = (heads < NUM_HEADS)[:, None]
        at = q_ptr + token * q_stride + heads[:, None] * (NOPE + ROPE) + NOPE + tl.arange(0, ROPE)[None, :]
        given = tl.load(at, mask=exists, other=0.0)
        first, second = tl.split(tl.reshape(given.to(tl.float32), (HEADS, half, 2)))
        new_first = first * cos[None, :] - second * sin[None, :]
        new_second = second * cos[None, :] + first * sin[None, :]
        rotated = tl.reshape(tl.join(new_first, new_second), (HEADS, ROPE)).to(given.dtype)
        tl.store(at, rotated, mask=exists)


@triton.jit
def _absorb(
    head,
    col,
    row,
    q_ptr,
    q_stride,
    weights_ptr,
    weights_stride,
    out_ptr,
    num_singles,
    NUM_HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Of ROWS tokens and one head, COLS latent features. The matrix does not depend on the kernel before: it is on its
    way while that one still runs."""
    cols = col * COLS + tl.arange(0, COLS)
    features = tl.arange(0, NOPE)
    weights = tl.load(weights_ptr + head * weights_stride + features[:, None] * LATENT + cols[None, :])
    gdc_wait()
    rows = row * ROWS + tl.arange(0, ROWS)
    valid = (rows < num_singles)[:, None]
    rows = rows.to(tl.int64)[:, None]
    q = tl.load(q_ptr + rows * q_stride + head * (NOPE + ROPE) + features[None, :], mask=valid, other=0.0)
    absorbed = tl.dot(q, weights)
    at = out_ptr + (rows * NUM_HEADS + head) * LATENT + cols[None, :]
    tl.store(at, absorbed.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["layer", "num_layers", "num_singles", "num_entering"])
def _enter(
    q_ptr,
    q_stride,
    kv_ptr,
    kv_stride,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    weight_ptr,
    rows_ptr,
    slots_ptr,
    layer,
    num_layers,
    eps,
    weights_ptr,
    weights_stride,
    out_ptr,
    num_singles,
    num_entering,  # programs; they come first, for they take longer
    NUM_HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,  # 0: none enter
    COLS: tl.constexpr,
):
    gdc_launch_dependents()
    program = tl.program_id(0)
    if ROWS:  # noqa: SIM102 - known when it is compiled
        if program < num_entering:
            pieces: tl.constexpr = LATENT // COLS
            head = (program // pieces % NUM_HEADS).to(tl.int64)
            _absorb(
                head,
                program % pieces,
                program // (pieces * NUM_HEADS),
                q_ptr,
                q_stride,
                weights_ptr,
                weights_stride,
                out_ptr,
                num_singles,
                NUM_HEADS,
                NOPE,
                ROPE,
                LATENT,
                ROWS,
                COLS,
            )
            return
    parts: tl.constexpr = 1 + (NUM_HEADS + HEADS - 1) // HEADS
    turning = program - num_entering
    _turn(
        (turning // parts).to(tl.int64),
        turning % parts,
        q_ptr,
        q_stride,
        kv_ptr,
        kv_stride,
        cos_ptr,
        sin_ptr,
        positions_ptr,
        weight_ptr,
        rows_ptr,
        slots_ptr,
        layer,
        num_layers,
        eps,
        NUM_HEADS,
        NOPE,
        ROPE,
        LATENT,
        BLOCK_SIZE,
        HEADS,
    )


_launch_enter = Launcher(_enter)


def enter_latents(
    q: Tensor,
    kv: Tensor,
    rotation: RotationTable,
    positions: Tensor,
    weight: Tensor,
    eps: float,
    pages: Tensor,
    slots: Tensor,
    layer: int,
    num_singles: int,
    key_weights: Tensor,
) -> Tensor | None:
    """q [T, H, N + R]: the last R features of every head rotated, interleaved, in place. kv [T, L + R], rows of any
    stride: the latent normed with `weight` [L], the key rotated, in place; then the row is written to `pages`
    [blocks, layers, S, L + R] at `slots` [T] of `layer`. key_weights [H, N, L], any stride of H: with it the first
    `num_singles` queries come into latent space, [A, H, L]; None if there are none, or more than ENDS_ROWS.

    N, L and R are powers of two, 16 or more.
    """
    _, num_layers, block_size, row = pages.shape
    num_tokens, num_heads, query = q.shape
    rope, latent = 2 * rotation.cos.shape[-1], row - 2 * rotation.cos.shape[-1]
    assert q.stride(1) == query and q.stride(2) == 1 and kv.stride(1) == 1, "heads lie side by side"
    out: Tensor | None = None
    rows = cols = num_entering = 0
    if 0 < num_singles <= ENDS_ROWS:
        out = torch.empty(num_singles, num_heads, latent, dtype=q.dtype, device=q.device)
        rows = min(max(power_of_two(num_singles), 16), 64)
        cols = min(latent, 128 if num_singles > 16 else 64)
        num_entering = num_heads * (latent // cols) * -(-num_singles // rows)
    arguments = (
        q,
        q.stride(0),
        kv,
        kv.stride(0),
        rotation.cos,
        rotation.sin,
        positions,
        weight,
        pages,
        slots,
        layer,
        num_layers,
        eps,
        key_weights,
        key_weights.stride(0),
        q if out is None else out,
        num_singles,
        num_entering,
    )
    constants = {
        "NUM_HEADS": num_heads,
        "NOPE": query - rope,
        "ROPE": rope,
        "LATENT": latent,
        "BLOCK_SIZE": block_size,
        "HEADS": _HEADS,
        "ROWS": rows,
        "COLS": cols,
    }
    parts = 1 + -(-num_heads // _HEADS)
    _launch_enter((num_entering + num_tokens * parts, 1, 1), arguments, constants, num_warps=4)
    return out

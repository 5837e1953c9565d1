"""What the sparse indexer keeps and asks, in one pass each, in Triton: norm, half-split rotation, fp8 with scales.

References: Indexer of workers.layers.mla and workers.attention.index_keys.

Shapes: T tokens, P rows that ask, I index heads, J index head size, R rotated features, S block size. Sums and
rotation are in fp32. Offsets into the cache are 64-bit.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow
from workers.kernels.fp8 import LARGEST, SMALLEST
from workers.kernels.launcher import Launcher
from workers.kernels.rotary import RotationTable

_HEADS = 16  # that one program quantises


@triton.jit(do_not_specialize=["layer", "num_layers"])
def _write_keys(
    keys_ptr,
    keys_stride,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    weight_ptr,
    bias_ptr,
    values_ptr,
    scales_ptr,
    slots_ptr,
    layer,
    num_layers,
    eps,
    SIZE: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    follow()
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = ROPE // 2
    pairs, rest = tl.arange(0, half), ROPE + tl.arange(0, SIZE - ROPE)
    row = keys_ptr + token * keys_stride
    left, right, tail = tl.load(row + pairs), tl.load(row + half + pairs), tl.load(row + rest)
    dtype = left.dtype
    x, y, z = left.to(tl.float32), right.to(tl.float32), tail.to(tl.float32)
    mean = (tl.sum(x) + tl.sum(y) + tl.sum(z)) / SIZE
    x, y, z = x - mean, y - mean, z - mean
    norm = tl.rsqrt((tl.sum(x * x) + tl.sum(y * y) + tl.sum(z * z)) / SIZE + eps)
    x = x * norm * tl.load(weight_ptr + pairs).to(tl.float32) + tl.load(bias_ptr + pairs).to(tl.float32)
    y = y * norm * tl.load(weight_ptr + half + pairs).to(tl.float32) + tl.load(bias_ptr + half + pairs).to(tl.float32)
    z = z * norm * tl.load(weight_ptr + rest).to(tl.float32) + tl.load(bias_ptr + rest).to(tl.float32)
    x, y, z = x.to(dtype).to(tl.float32), y.to(dtype).to(tl.float32), z.to(dtype).to(tl.float32)
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_ptr + position * half + pairs)
    sin = tl.load(sin_ptr + position * half + pairs)
    new_x, new_y = x * cos - y * sin, y * cos + x * sin
    largest = tl.maximum(tl.maximum(tl.max(tl.abs(new_x)), tl.max(tl.abs(new_y))), tl.max(tl.abs(z)))
    scale = tl.maximum(largest, SMALLEST) / LARGEST
    slot = tl.load(slots_ptr + token).to(tl.int64)
    page = (slot // BLOCK_SIZE * num_layers + layer) * (BLOCK_SIZE * (SIZE + 4))
    at = values_ptr + page + slot % BLOCK_SIZE * SIZE
    tl.store(at + pairs, (new_x / scale).to(tl.float8e4nv))
    tl.store(at + half + pairs, (new_y / scale).to(tl.float8e4nv))
    tl.store(at + rest, (z / scale).to(tl.float8e4nv))
    tl.store(scales_ptr + (page + BLOCK_SIZE * SIZE) // 4 + slot % BLOCK_SIZE, scale)


_launch_write_keys = Launcher(_write_keys)


@triton.jit
def _quantize_queries(
    queries_ptr,
    queries_stride,
    weights_ptr,
    weights_stride,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    values_ptr,
    out_ptr,
    factor,
    NUM_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    follow()
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    exists = (heads < NUM_HEADS)[:, None]
    half: tl.constexpr = ROPE // 2
    pairs, rest = tl.arange(0, half)[None, :], ROPE + tl.arange(0, SIZE - ROPE)[None, :]
    row = queries_ptr + token * queries_stride + heads[:, None] * SIZE
    x = tl.load(row + pairs, mask=exists, other=0.0).to(tl.float32)
    y = tl.load(row + half + pairs, mask=exists, other=0.0).to(tl.float32)
    z = tl.load(row + rest, mask=exists, other=0.0).to(tl.float32)
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_ptr + position * half + pairs)
    sin = tl.load(sin_ptr + position * half + pairs)
    new_x, new_y = x * cos - y * sin, y * cos + x * sin
    largest = tl.maximum(tl.maximum(tl.max(tl.abs(new_x), 1), tl.max(tl.abs(new_y), 1)), tl.max(tl.abs(z), 1))
    scale = tl.maximum(largest, SMALLEST) / LARGEST
    at = values_ptr + (token * NUM_HEADS + heads[:, None]) * SIZE
    tl.store(at + pairs, (new_x / scale[:, None]).to(tl.float8e4nv), mask=exists)
    tl.store(at + half + pairs, (new_y / scale[:, None]).to(tl.float8e4nv), mask=exists)
    tl.store(at + rest, (z / scale[:, None]).to(tl.float8e4nv), mask=exists)
    weights = tl.load(weights_ptr + token * weights_stride + heads, mask=heads < NUM_HEADS, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * NUM_HEADS + heads, weights * factor * scale, mask=heads < NUM_HEADS)


_launch_quantize_queries = Launcher(_quantize_queries)


def write_index_keys(
    keys: Tensor,
    rotation: RotationTable,
    positions: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    pages: Tensor,
    block_size: int,
    slots: Tensor,
    layer: int,
) -> None:
    """keys [T, J], rows of any stride: layer-normed with `weight` and `bias` [J], the first R features rotated
    half-split, quantised, and written to `pages` uint8 [blocks, layers, S * (J + 4)] at `slots` [T] of `layer`.

    positions [T] int64. R and J - R are powers of two.
    """
    num_tokens, size = keys.shape
    assert keys.stride(1) == 1 and pages.shape[2] == block_size * (size + 4), "pages of other rows"
    arguments = (
        keys,
        keys.stride(0),
        rotation.cos,
        rotation.sin,
        positions,
        weight,
        bias,
        pages.view(torch.float8_e4m3fn),
        pages.view(torch.float32),
        slots,
        layer,
        pages.shape[1],
        eps,
    )
    constants = {
        "SIZE": size,
        "ROPE": 2 * rotation.cos.shape[-1],
        "BLOCK_SIZE": block_size,
        "LARGEST": LARGEST,
        "SMALLEST": SMALLEST,
    }
    _launch_write_keys((num_tokens, 1, 1), arguments, constants, num_warps=1)


def quantize_queries(
    queries: Tensor, weights: Tensor, rotation: RotationTable, positions: Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    """queries [P, I, J], weights [P, I], rows of any stride -> e4m3 [P, I, J], fp32 [P, I].

    The first R features of a query are rotated half-split; its scale and `factor` are in its weight.
    positions [P] int64. R and J - R are powers of two.
    """
    num_rows, num_heads, size = queries.shape
    assert queries.stride(1) == size and queries.stride(2) == 1 and weights.stride(1) == 1, "heads lie side by side"
    values = torch.empty(num_rows, num_heads, size, dtype=torch.float8_e4m3fn, device=queries.device)
    out = torch.empty(num_rows, num_heads, dtype=torch.float32, device=queries.device)
    arguments = (
        queries,
        queries.stride(0),
        weights,
        weights.stride(0),
        rotation.cos,
        rotation.sin,
        positions,
        values,
        out,
        factor,
    )
    constants = {
        "NUM_HEADS": num_heads,
        "SIZE": size,
        "ROPE": 2 * rotation.cos.shape[-1],
        "HEADS": _HEADS,
        "LARGEST": LARGEST,
        "SMALLEST": SMALLEST,
    }
    _launch_quantize_queries((num_rows, -(-num_heads // _HEADS), 1), arguments, constants, num_warps=4)
    return values, out

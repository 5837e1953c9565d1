"""Attention of several queries per sequence, in Triton: over keys packed beside the queries, or over K/V pages where
they lie. Reference: TorchKernels of workers.attention.packed.

One pass over the keys with a running maximum, a tile of queries and a head per program. Which queries a tile has is
read on the device. A bias depends on how far a key stands from its query and is read from a table of distances: nothing
of the size of all scores is ever made.

Source: Dao, "FlashAttention-2" (2023). Shapes: T packed rows, B sequences, H heads (each with its own key and value),
D head size, S block size, M blocks of the longest.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow
from workers.kernels.launcher import Launcher

LOG2_E = 1.4426950408889634
_TILE = 64  # keys; blocks hold a multiple


@triton.jit(
    do_not_specialize=["table_stride", "bias_stride", "bias_zero", "layer", "num_layers"],
    do_not_specialize_on_alignment=["table_ptr", "spans_ptr", "tiles_ptr", "bias_ptr"],
)
def _attend(
    q_ptr,
    keys_ptr,
    values_ptr,
    table_ptr,
    table_stride,
    spans_ptr,
    tiles_ptr,
    bias_ptr,
    bias_stride,
    bias_zero,
    out_ptr,
    layer,
    num_layers,
    scale,
    Q_STRIDE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PAGED: tl.constexpr,
    LOG2: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    follow()
    head = tl.program_id(1)
    sequence = tl.load(tiles_ptr + tl.program_id(0) * 2).to(tl.int64)
    begin = tl.load(tiles_ptr + tl.program_id(0) * 2 + 1)
    start = tl.load(spans_ptr + sequence * 3).to(tl.int64)
    num_queries = tl.load(spans_ptr + sequence * 3 + 1)
    num_keys = tl.load(spans_ptr + sequence * 3 + 2)
    if begin >= num_queries:
        return
    rows, features, tokens = begin + tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, TILE)
    valid = (rows < num_queries)[:, None]
    at = num_keys - num_queries + rows  # among the keys
    own = head * DIM + features
    q = tl.load(q_ptr + (start + rows)[:, None] * Q_STRIDE + own[None, :], mask=valid, other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    end = num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, num_keys - num_queries + begin + ROWS)
    num_tiles = tl.cdiv(end, TILE)
    tiles_per_block: tl.constexpr = BLOCK_SIZE // TILE
    page: tl.constexpr = HEADS * BLOCK_SIZE * DIM
    ahead = start
    if PAGED:
        ahead = tl.load(table_ptr + sequence * table_stride).to(tl.int64)
    for tile in range(num_tiles):
        here = tile * TILE + tokens < num_keys
        if PAGED:
            block = ahead
            # One tile ahead: a load that waits for another one in its own round is not pipelined.
            following = tl.minimum(tile + 1, num_tiles - 1) // tiles_per_block
            ahead = tl.load(table_ptr + sequence * table_stride + following).to(tl.int64)
            inside = (head * BLOCK_SIZE + tile % tiles_per_block * TILE + tokens) * DIM
            keys_at = (block * num_layers + layer) * 2 * page + inside[:, None] + features[None, :]
            values_at = keys_at + page
        else:
            keys_at = (start + tile * TILE + tokens)[:, None] * KEY_STRIDE + own[None, :]
            values_at = keys_at
        # What lies behind the end may be anything, NaN included, and a weight of 0 does not silence that in a value.
        keys = tl.load(keys_ptr + keys_at, mask=here[:, None], other=0.0)
        values = tl.load(values_ptr + values_at, mask=here[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(keys)) * scale
        seen = here[None, :]
        distance = tile * TILE + tokens[None, :] - at[:, None]
        if CAUSAL:
            seen = seen & (distance <= 0)
        if HAS_BIAS:
            column = bias_zero - distance if CAUSAL else bias_zero + distance
            added = tl.load(bias_ptr + head * bias_stride + column, mask=seen & valid, other=0.0)
            scores += added.to(tl.float32) * LOG2
        scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
        best = new_best
    at_out = out_ptr + (start + rows)[:, None] * (HEADS * DIM) + own[None, :]
    tl.store(at_out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=valid)


_launch_attend = Launcher(_attend)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    tiles: Tensor,
    tile: int,
    scale: float,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """q, k, v [T, H, D] (heads side by side, rows of any stride, k and v of one), spans int32 [B, 3]: first row, and
    rows twice, of each sequence, tiles int32 [N, 2]: the sequence and the first query of each, a multiple of `tile`
    -> out [T, H, D], contiguous. Each sees all of its sequence.

    bias [H, 2 C - 1], C >= the longest, last dim contiguous: added to the scaled score of the key that stands so far
    behind the query, C - 1 standing for itself.
    """
    assert k.stride() == v.stride(), "keys and values lie alike"
    zero = 0 if bias is None else (bias.shape[1] - 1) // 2
    where = (None, k.stride(0), _TILE)
    _launch(q, (k, v), where, spans, tiles, tile, (0, 1), scale, bias, zero, out, causal=False)


def paged_attention(
    q: Tensor,
    pages: Tensor,
    table: Tensor,
    layer: int,
    spans: Tensor,
    tiles: Tensor,
    tile: int,
    scale: float,
    bias: Tensor | None,
    out: Tensor,
    *,
    causal: bool,
) -> None:
    """q [T, H, D] (heads side by side, rows of any stride), pages [blocks, layers, 2, H, S, D], table [B, M], spans
    int32 [B, 3]: first row, queries and keys of each sequence, tiles as above -> out [T, H, D], contiguous, in the rows
    of these queries.

    Causal: the last query sees all keys, the one before it one less; else each sees all of them. bias [H, most keys],
    of causal attention alone: added to the scaled score of the key that stands so far before the query.
    """
    assert bias is None or causal, "a bias by distance before the query"
    layers, block_size = pages.shape[1], pages.shape[4]
    where = (table, 0, block_size)
    _launch(q, (pages, pages), where, spans, tiles, tile, (layer, layers), scale, bias, 0, out, causal=causal)


def _launch(
    q: Tensor,
    keys_and_values: tuple[Tensor, Tensor],
    where: tuple[Tensor | None, int, int],
    spans: Tensor,
    tiles: Tensor,
    tile: int,
    layer: tuple[int, int],
    scale: float,
    bias: Tensor | None,
    bias_zero: int,
    out: Tensor,
    *,
    causal: bool,
) -> None:
    """`where`: the block table, the stride of packed keys, the block size; `layer`: and of how many."""
    table, key_stride, block_size = where
    _, num_heads, dim = q.shape
    arguments = (
        q,
        *keys_and_values,
        spans if table is None else table,
        0 if table is None else table.stride(0),
        spans,
        tiles,
        q if bias is None else bias,
        0 if bias is None else bias.stride(0),
        bias_zero,
        out,
        *layer,
        scale * LOG2_E,
    )
    constants = {
        "Q_STRIDE": q.stride(0),
        "KEY_STRIDE": key_stride,
        "HAS_BIAS": bias is not None,
        "CAUSAL": causal,
        "PAGED": table is not None,
        "LOG2": LOG2_E,
        "HEADS": num_heads,
        "DIM": dim,
        "BLOCK_SIZE": block_size,
        "ROWS": tile,
        "TILE": _TILE,
    }
    _launch_attend((len(tiles), num_heads, 1), arguments, constants, num_warps=tile // 16)

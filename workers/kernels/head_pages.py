"""Keys and values of new tokens into their K/V pages in one launch, in Triton. Reference: TorchKernels of
workers.attention.packed. Shapes: T tokens, H heads, D head size, S block size.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow
from workers.kernels.launcher import Launcher, power_of_two


@triton.jit(do_not_specialize=["layer", "num_layers"], do_not_specialize_on_alignment=["slots_ptr"])
def _write(
    k_ptr,
    v_ptr,
    pages_ptr,
    slots_ptr,
    layer,
    num_layers,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_UP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    follow()
    token = tl.program_id(0).to(tl.int64)
    heads, features = tl.arange(0, HEADS_UP)[:, None], tl.arange(0, DIM)[None, :]
    exists = heads < HEADS
    given = token * STRIDE + heads * DIM + features
    slot = tl.load(slots_ptr + token).to(tl.int64)
    page: tl.constexpr = HEADS * BLOCK_SIZE * DIM
    at = (
        (slot // BLOCK_SIZE * num_layers + layer) * 2 * page + (heads * BLOCK_SIZE + slot % BLOCK_SIZE) * DIM + features
    )
    tl.store(pages_ptr + at, tl.load(k_ptr + given, mask=exists), mask=exists)
    tl.store(pages_ptr + page + at, tl.load(v_ptr + given, mask=exists), mask=exists)


_launch_write = Launcher(_write)


def write_heads(k: Tensor, v: Tensor, pages: Tensor, slots: Tensor, layer: int) -> None:
    """k, v [T, H, D] (heads side by side, rows of any stride, alike), slots [T] -> `layer` of pages
    [blocks, layers, 2, H, S, D]. D is a power of two."""
    assert k.stride() == v.stride(), "keys and values lie alike"
    _, num_layers, _, num_heads, block_size, dim = pages.shape
    constants = {
        "STRIDE": k.stride(0),
        "HEADS": num_heads,
        "HEADS_UP": power_of_two(num_heads),
        "DIM": dim,
        "BLOCK_SIZE": block_size,
    }
    _launch_write((len(k), 1, 1), (k, v, pages, slots, layer, num_layers), constants, num_warps=4)

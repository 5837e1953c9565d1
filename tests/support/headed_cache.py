"""A small encoder–decoder attention problem, and a cache for it in which nobody has written."""

from __future__ import annotations

import math

import torch

from workers.attention.interface import AttentionProblem, KvCache

HEADS, SIZE, BLOCK, LAYERS = 3, 8, 4, 2
PROBLEM = AttentionProblem(
    kind="encoder_decoder",
    num_heads=HEADS,
    num_kv_heads=HEADS,
    head_dim=SIZE,
    block_size=BLOCK,
    dtype=torch.float32,
    scale=0.5,
)


def nan_cache(num_blocks: int) -> KvCache:
    """NaN in every block but the null block: what must not be read would spread."""
    pages = torch.full((num_blocks, LAYERS, 2, HEADS, BLOCK, SIZE), math.nan)
    pages[0] = 0.0
    return KvCache({"kv": pages})

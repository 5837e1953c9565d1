"""Relative position bias as T5 has it: scores of near keys each learn their own value, those of far ones share.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020),
section 2.1. Shapes: H heads, L longest sequence of a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def distance_buckets(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Distances >= 0 -> bucket numbers: half of them exact, the rest wider and wider up to `max_distance`."""
    num_exact = num_buckets // 2
    far = torch.log(distance.float() / num_exact) / math.log(max_distance / num_exact) * (num_buckets - num_exact)
    far = (num_exact + far.clamp_(min=0).to(torch.long)).clamp_(max=num_buckets - 1)
    return torch.where(distance < num_exact, distance, far)


def causal_bias(table: Tensor, longest: int, max_distance: int) -> Tensor:
    """Table [num_buckets, H] -> [H, longest]: by how far the key stands before the query, itself included."""
    distance = torch.arange(longest, device=table.device)
    return table[distance_buckets(distance, len(table), max_distance)].t().contiguous()


def bidirectional_bias(table: Tensor, longest: int, max_distance: int) -> Tensor:
    """Table [num_buckets, H] -> [H, 2 longest - 1]: by how far the key stands behind the query, from 1 - longest on.
    The second half of the buckets is for keys behind their query."""
    half = len(table) // 2
    relative = torch.arange(1 - longest, longest, device=table.device)
    buckets = distance_buckets(relative.abs(), half, max_distance) + (relative > 0) * half
    return table[buckets].t().contiguous()


def windows(bias: Tensor, longest: int) -> Tensor:
    """[H, 2 C - 1] by how far a key stands behind its query -> [H, longest, longest] by query and key, longest <= C."""
    zero = bias.shape[1] // 2
    near = bias[:, zero - longest + 1 : zero + longest]
    return near.unfold(1, longest, 1).flip(1)  # the last query's comes first

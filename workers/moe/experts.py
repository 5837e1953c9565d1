"""What experts compute, over slots. Shapes: T tokens, d hidden, I inner size, k slots per token.

A slot is a place where one expert's weights lie; which expert that is, is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class ExpertWeights(NamedTuple):
    """One slot's matrices; views of wherever they lie."""

    gate: Tensor  # [I, d]
    up: Tensor  # [I, d]
    down: Tensor  # [d, I]


def compute(x: Tensor, slots: Tensor, weights: Tensor | None, weights_of: Callable[[int], ExpertWeights]) -> Tensor:
    """x [T, d], slots [T, k] int64 (-1: none) -> y, in the dtype of x: down(silu(gate(x)) * up(x)) in each slot.

    With `weights` [T, k] fp32 y is [T, d], each token's weighted sum over its slots, added up in fp32. Without, y is
    [T, k, d], zero where there is no slot, and the caller sums. One pass over each slot that has a token.
    """
    per_token = slots.shape[1]
    flat = slots.flatten()
    order = flat.argsort(stable=True)
    counts = (flat + 1).bincount().tolist()  # [0]: no slot
    rows = x.index_select(0, order // per_token)  # each slot's tokens side by side
    out = rows.new_zeros(rows.shape) if counts and counts[0] else rows.new_empty(rows.shape)
    start = 0
    for slot, count in enumerate(counts, -1):
        end = start + count
        if count and slot >= 0:
            gate, up, down = weights_of(slot)
            mine = rows[start:end]
            out[start:end] = F.linear(F.silu(F.linear(mine, gate)).mul_(F.linear(mine, up)), down)
        start = end
    by_token = rows.new_empty(rows.shape).index_copy_(0, order, out).unflatten(0, (-1, per_token))
    if weights is None:
        return by_token
    return (by_token * weights.unsqueeze(-1)).sum(1).to(x.dtype)

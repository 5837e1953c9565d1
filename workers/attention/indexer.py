"""Which tokens a sparse query sees: index scores and their top-k, in plain torch.

Shapes: B sequences with n query tokens each (B or n is 1), P = B * n, C context, I index heads, J index head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_SCORES = 1 << 24  # elements of [queries, I, C] that exist at a time


def index_scores(queries: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """queries [B, n, I, J], weights [B, n, I] fp32, keys [B, C, J] -> [B, n, C] fp32.

    The sum over heads of weight * relu(query · key). Computed in fp32 in pieces of bounded size; pieces do not change
    a result.
    """
    b, n, heads, _ = queries.shape
    context = keys.shape[1]
    step = max(1, MAX_SCORES // max(heads * context, 1))
    if b * n <= step:
        return _scores(queries, weights, keys)
    axis = 0 if b > 1 else 1
    parts = [
        _scores(q, w, keys[start : start + step] if axis == 0 else keys)
        for start, q, w in zip(range(0, b * n, step), queries.split(step, axis), weights.split(step, axis), strict=True)
    ]
    return torch.cat(parts, axis)


def _scores(queries: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    b, n, heads, _ = queries.shape
    dots = queries.float().flatten(1, 2) @ keys.float().transpose(1, 2)  # [B, n * I, C]
    return (weights.float().unsqueeze(2) @ dots.relu_().view(b, n, heads, -1)).squeeze(2)


def select(scores: Tensor, num_visible: Tensor, topk: int) -> Tensor:
    """scores [P, C] fp32, num_visible [P] int64 (>= 1) -> positions [P, min(topk, C)] int64, best first.

    A query that sees fewer tokens than that gets all of them, then -1. Scores of tokens that it does not see may be
    anything, NaN included. `scores` is overwritten.
    """
    hidden = torch.arange(scores.shape[1], device=scores.device) >= num_visible.unsqueeze(1)
    best = scores.masked_fill_(hidden, float("-inf")).topk(min(topk, scores.shape[1]), -1).indices
    return best.masked_fill_(best >= num_visible.unsqueeze(1), -1)

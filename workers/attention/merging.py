"""Attention over parts of a context, and how the parts become one. Logarithms are natural throughout.

Shapes: n queries, C keys, H heads, D key size, V value size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PartialAttention(NamedTuple):
    """What the queries saw in one part of the context, and how much weight that part has."""

    out: Tensor  # [n, H, V] fp32, softmax over this part alone
    lse: Tensor  # [n, H] fp32: log of the sum of exp(score)


def attend_part(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> PartialAttention:
    """q [n, H, D], k [C, H, D], v [C, H, V]. Causal: query i sees keys 0 … i, and C is n. C is at least 1."""
    assert len(k) > 0, "an empty part has no softmax; leave it out"
    scores = (q.transpose(0, 1) @ k.permute(1, 2, 0)).float() * scale  # [H, n, C]
    if causal:
        above = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill(above, float("-inf"))
    lse = scores.logsumexp(-1)  # [H, n]
    weights = (scores - lse.unsqueeze(-1)).exp()
    out = weights.to(v.dtype) @ v.transpose(0, 1)  # [H, n, V]
    return PartialAttention(out.transpose(0, 1).float(), lse.transpose(0, 1))


def merge(left: PartialAttention, right: PartialAttention) -> PartialAttention:
    """The attention over both parts at once. Associative; parts must not overlap."""
    lse = torch.logaddexp(left.lse, right.lse)
    out = left.out * (left.lse - lse).exp().unsqueeze(-1) + right.out * (right.lse - lse).exp().unsqueeze(-1)
    return PartialAttention(out, lse)

"""Which experts each token goes to, and with what weight. Shapes: T tokens, E experts, G groups, k per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRule:
    """Sigmoid scores, a bias that balances load, experts limited to the best groups ("noaux_tc")."""

    num_experts: int  # E
    num_groups: int  # G; divides E
    max_groups: int  # groups that a token may use
    experts_per_token: int  # k
    normalize: bool  # weights of a token add up to `scale`
    scale: float


class Routing(NamedTuple):
    """`experts` [T, k] int64, no expert twice in a row, in no order; `weights` [T, k] fp32."""

    experts: Tensor
    weights: Tensor


def route(logits: Tensor, bias: Tensor, rule: RoutingRule) -> Routing:
    """logits [T, E] fp32, bias [E] fp32.

    The bias has a say in the choice and none in the weights. A group counts for its two best experts. Experts of the
    other groups are excluded with -inf: a biased score may be negative, and 0 would then win.
    """
    scores = logits.sigmoid()
    biased = scores + bias
    if rule.max_groups < rule.num_groups:
        grouped = biased.unflatten(-1, (rule.num_groups, -1))  # [T, G, E / G]
        best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1).topk(rule.max_groups, -1).indices
        excluded = torch.ones(grouped.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best, False)
        biased = grouped.masked_fill(excluded.unsqueeze(-1), float("-inf")).flatten(1)
    experts = biased.topk(rule.experts_per_token, -1, sorted=False).indices
    weights = scores.gather(1, experts)
    if rule.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(experts, weights * rule.scale)

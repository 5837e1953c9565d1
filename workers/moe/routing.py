"""Which experts each token goes to, and with what weight. Shapes: T tokens, E experts, G groups, k per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

Scoring: TypeAlias = Literal["sigmoid", "softmax"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRule:
    """Scores of all experts, experts limited to the best groups, the best of those.

    DeepSeek's names: "noaux_tc" is sigmoid scores, a bias that balances load, groups that count for their two best
    experts; "group_limited_greedy" is softmax scores and groups that count for their best; "greedy" is one group.
    """

    num_experts: int  # E
    experts_per_token: int  # k
    normalize: bool  # weights of a token add up to `scale`
    scale: float = 1.0
    scoring: Scoring = "softmax"
    balanced: bool = False  # the checkpoint has a bias [E]
    num_groups: int = 1  # G; divides E
    max_groups: int = 1  # groups that a token may use
    best_of_group: int = 1  # how many of its experts a group counts for


class Routing(NamedTuple):
    """`experts` [T, k] int64, no expert twice in a row, in no order; `weights` [T, k] fp32."""

    experts: Tensor
    weights: Tensor


def route(logits: Tensor, bias: Tensor | None, rule: RoutingRule) -> Routing:
    """logits [T, E] fp32, bias [E] fp32.

    The bias has a say in the choice and none in the weights. Experts of groups that are not chosen are excluded with
    -inf: a biased score may be negative, and 0 would then win.
    """
    scores = logits.sigmoid() if rule.scoring == "sigmoid" else logits.softmax(-1)
    biased = scores if bias is None else scores + bias
    if rule.max_groups < rule.num_groups:
        grouped = biased.unflatten(-1, (rule.num_groups, -1))  # [T, G, E / G]
        counting = min(rule.best_of_group, grouped.shape[-1])
        best = grouped.topk(counting, -1).values.sum(-1).topk(rule.max_groups, -1).indices
        excluded = torch.ones(grouped.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best, False)
        biased = grouped.masked_fill(excluded.unsqueeze(-1), float("-inf")).flatten(1)
    experts = biased.topk(rule.experts_per_token, -1, sorted=False).indices
    weights = scores.gather(1, experts)
    if rule.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(experts, weights * rule.scale)

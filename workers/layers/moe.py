"""The feed-forward layer of many experts, of which each token uses a few. Shapes: T tokens, d hidden size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.layers.linear import Linear, Partition
from workers.layers.mlp import GatedMlp
from workers.moe import experts
from workers.moe.experts import ExpertWeights
from workers.moe.routing import Routing, RoutingRule, route


class Router(Linear):
    """Computes in fp32, whatever the model's dtype: near choices must not depend on it."""

    def __init__(self, hidden_size: int, rule: RoutingRule, *, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, rule.num_experts, partition=Partition.REPLICATED, dtype=dtype)
        self.rule = rule
        bias = torch.empty(rule.num_experts, dtype=torch.float32)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def route(self, x: Tensor) -> Routing:
        """x [T, d]."""
        return route(F.linear(x.float(), self.weight.float()), self.e_score_correction_bias, self.rule)


class SparseMlp(nn.Module):
    """x [T, d] -> [T, d]: the weighted sum of each token's experts, plus an expert that all tokens share.

    Each expert keeps the matrices that the checkpoint has for it, so that they can be views of the file.
    """

    def __init__(
        self, hidden_size: int, inner_size: int, num_shared: int, rule: RoutingRule, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.gate = Router(hidden_size, rule, dtype=dtype)
        self.experts = nn.ModuleList(GatedMlp(hidden_size, inner_size, dtype=dtype) for _ in range(rule.num_experts))
        self.shared_experts = GatedMlp(hidden_size, inner_size * num_shared, dtype=dtype) if num_shared else None

    def forward(self, x: Tensor) -> Tensor:
        routing = self.gate.route(x)
        # Without load balancing the logical expert is its slot.
        y = experts.compute(x, routing.experts, routing.weights, self._weights_of)
        return y if self.shared_experts is None else y.add_(self.shared_experts(x))

    def _weights_of(self, slot: int) -> ExpertWeights:
        expert = self.experts[slot]
        assert isinstance(expert, GatedMlp)
        return ExpertWeights(expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight)

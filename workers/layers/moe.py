"""The feed-forward layer of many experts, of which each token uses a few. Shapes: T tokens, d hidden size."""

from __future__ import annotations

from dataclasses import dataclass

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
        self.e_score_correction_bias = None
        if rule.balanced:
            bias = torch.empty(rule.num_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def route(self, x: Tensor) -> Routing:
        """x [T, d]."""
        return route(F.linear(x.float(), self.weight.float()), self.e_score_correction_bias, self.rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    inner_size: int
    routing: RoutingRule
    num_shared: int = 0  # sizes of `inner_size` that an expert of all tokens has
    shared_bias: bool = False


class SparseMlp(nn.Module):
    """x [T, d] -> [T, d]: the weighted sum of each token's experts, plus an expert that all tokens share.

    Each expert keeps the matrices that the checkpoint has for it, so that they can be views of the file.
    """

    def __init__(self, hidden_size: int, shape: ExpertShape, *, dtype: torch.dtype) -> None:
        super().__init__()
        d, inner = hidden_size, shape.inner_size
        self.gate = Router(d, shape.routing, dtype=dtype)
        self.experts = nn.ModuleList(GatedMlp(d, inner, dtype=dtype) for _ in range(shape.routing.num_experts))
        self.shared_experts = None
        if shape.num_shared:
            self.shared_experts = GatedMlp(d, inner * shape.num_shared, dtype=dtype, bias=shape.shared_bias)

    def forward(self, x: Tensor) -> Tensor:
        routing = self.gate.route(x)
        # Without load balancing the logical expert is its slot.
        y = experts.compute(x, routing.experts, routing.weights, self._weights_of)
        return y if self.shared_experts is None else y.add_(self.shared_experts(x))

    def _weights_of(self, slot: int) -> ExpertWeights:
        expert = self.experts[slot]
        assert isinstance(expert, GatedMlp)
        return ExpertWeights(expert.gate_proj.matrix(), expert.up_proj.matrix(), expert.down_proj.matrix())

"""Feed-forward layers of few launches, for the GPU. References: GatedMlp and SparseMlp.

Shapes: T tokens, d hidden, I inner size, E experts, k slots per token, those that all tokens share included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from workers.kernels.activation import silu_mul
from workers.kernels.expert_routing import RouteSpec, plan_rows, route
from workers.kernels.grouped_gemm import down, finalize, gate_up, single_rows
from workers.kernels.skinny_gemm import skinny_gate_up
from workers.kernels.tactics import DENSE_TOKENS, SINGLE_ENTRIES, SKINNY, SKINNY_ROWS, expert_tactics
from workers.layers.mlp import GatedMlp
from workers.layers.moe import SparseMlp
from workers.layers.packed_weights import PackedLinear, pack_experts

# Router logits [T, E] fp32, the tokens' cache slots [T], what is asked -> experts [T, k] int32, weights [T, k] fp32.
Chooser: TypeAlias = Callable[[Tensor, Tensor, RouteSpec], tuple[Tensor, Tensor]]


class FusedMlp:
    """x [T, d] -> [T, d]."""

    def __init__(self, mlp: GatedMlp) -> None:
        self._both = PackedLinear([mlp.gate_proj, mlp.up_proj])
        self._down = mlp.down_proj

    def __call__(self, x: Tensor, slots: Tensor) -> Tensor:
        if len(x) > SKINNY_ROWS or self._both.bias is not None:
            return self._down(silu_mul(self._both(x)))
        return self._down(skinny_gate_up(x, self._both.weight, SKINNY))


class FusedExperts:
    """x [T, d] -> [T, d]. A shared expert computes as further slots that every token has, with weight 1; for many
    tokens as the dense layer that it is, whose products are then faster.

    `choose` is the learned routing; who measures with weights that were never trained puts another there.
    """

    def __init__(self, mlp: SparseMlp) -> None:
        experts = [expert for expert in mlp.experts if isinstance(expert, GatedMlp)]
        self._router = mlp.gate
        self._both, self._downs = pack_experts(experts, mlp.shared_experts)
        rule = mlp.gate.rule
        self.spec = RouteSpec(
            rule.num_experts,
            rule.experts_per_token,
            len(self._both) - len(experts),
            rule.scale,
            rule.scoring == "sigmoid",
            rule.balanced,
            rule.normalize,
            rule.num_groups,
            rule.max_groups,
            rule.best_of_group,
        )
        self._routed = self.spec._replace(shared=0)
        self._shared = None if mlp.shared_experts is None else FusedMlp(mlp.shared_experts)
        self.choose: Chooser = self._choose
        self._rows = torch.arange(SINGLE_ENTRIES, dtype=torch.int32, device=self._both.device)

    def __call__(self, x: Tensor, slots: Tensor) -> Tensor:
        # Products of bf16 are exact in fp32: no rounding of the weights, whatever the choice is near to.
        logits = torch.mm(x, self._router.weight.t(), out_dtype=torch.float32)
        apart = self._shared is not None and len(x) >= DENSE_TOKENS
        chosen, weights = self.choose(logits, slots, self._routed if apart else self.spec)
        first, second = expert_tactics(chosen.numel(), len(self._both))
        if chosen.numel() <= SINGLE_ENTRIES:
            plan = single_rows(chosen, self._rows)
        else:
            plan = plan_rows(chosen, len(self._both), first.rows)
        inner = gate_up(x, self._both, plan, first, chosen.shape[1])
        base = self._shared(x, slots) if apart and self._shared is not None else None
        return finalize(down(inner, self._downs, plan, second), weights, base)

    def _choose(self, logits: Tensor, slots: Tensor, spec: RouteSpec) -> tuple[Tensor, Tensor]:
        return route(logits, self._router.e_score_correction_bias, spec)

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
from workers.kernels.fp8_rows import QuantizedRows, quantize_rows, silu_mul_quantized
from workers.kernels.grouped_gemm import down, gate_up, single_rows
from workers.kernels.norms import ExpertOutputs, PendingNorm, rms_norm
from workers.kernels.skinny_gemm import skinny_gate_up, skinny_linear
from workers.kernels.tactic_table import RULES, TacticTable
from workers.kernels.tactics import DENSE_TOKENS, ROUTER, ROUTER_ROWS, SINGLE_ENTRIES, SKINNY_ROWS
from workers.layers.fp8_experts import Fp8Experts
from workers.layers.mlp import GatedMlp
from workers.layers.moe import SparseMlp
from workers.layers.norm import RmsNorm
from workers.layers.packed_weights import PackedExperts, PackedLinear, pack_experts

# Router logits [T, E] fp32, the tokens' cache slots [T], what is asked -> experts [T, k] int32, weights [T, k] fp32.
Chooser: TypeAlias = Callable[[Tensor, Tensor, RouteSpec], tuple[Tensor, Tensor]]


class FusedMlp:
    """x [T, d] -> [T, d]."""

    def __init__(self, mlp: GatedMlp, tactics: TacticTable = RULES) -> None:
        self._both = PackedLinear([mlp.gate_proj, mlp.up_proj], tactics)
        self._down = PackedLinear([mlp.down_proj], tactics)
        self._tactics = tactics

    @property
    def in_fp8(self) -> bool:
        """Whether it has a use for x in fp8."""
        return self._both.scales is not None

    def __call__(self, x: Tensor, slots: Tensor, quantized: QuantizedRows | None = None) -> Tensor:
        return self._of(x, quantized)

    def _of(self, x: Tensor, quantized: QuantizedRows | None = None) -> Tensor:
        if self.in_fp8 and self._down.scales is not None:
            both = self._both(x, quantized)
            return self._down(both, silu_mul_quantized(both))
        if self.in_fp8 or len(x) > SKINNY_ROWS or self._both.bias is not None:
            return self._down(silu_mul(self._both(x, quantized)))
        weight = self._both.weight
        return self._down(skinny_gate_up(x, weight, self._tactics.skinny(weight.shape, gated=True)))

    @property
    def is_plain(self) -> bool:
        """Whether `absorb` and `add_to` can be."""
        return self._both.is_plain and self._down.is_plain

    def absorb(self, norm: Tensor) -> None:
        """The weights [d] of the norm of x become part of the matrix."""
        self._both.absorb(norm)

    def add_to(self, x: Tensor, norm: RmsNorm) -> None:
        """x [T, d], of whose norm the weights have been absorbed: it is itself what is added to."""
        if len(x) > SKINNY_ROWS:
            self._down.add_to(x, silu_mul(self._both(x), PendingNorm(x, norm.eps)))
        elif len(x):
            x += self._of(rms_norm(x, norm.weight, norm.eps))


class FusedExperts:
    """x [T, d] -> what sums to [T, d]. A shared expert computes as further slots that every token has, with weight 1;
    for many tokens as the dense layer that it is, whose products are then faster.

    `choose` is the learned routing; who measures with weights that were never trained puts another there.
    """

    def __init__(self, mlp: SparseMlp, tactics: TacticTable = RULES) -> None:
        experts = [expert for expert in mlp.experts if isinstance(expert, GatedMlp)]
        self._router = mlp.gate
        packed = pack_experts(experts, mlp.shared_experts)
        self._experts = (_Bf16Experts if packed.both_scales is None else Fp8Experts)(packed, tactics)
        rule = mlp.gate.rule
        self.spec = RouteSpec(
            rule.num_experts,
            rule.experts_per_token,
            len(packed.both) - len(experts),
            rule.scale,
            rule.scoring == "sigmoid",
            rule.balanced,
            rule.normalize,
            rule.num_groups,
            rule.max_groups,
            rule.best_of_group,
        )
        self._routed = self.spec._replace(shared=0)
        self._shared = None if mlp.shared_experts is None else FusedMlp(mlp.shared_experts, tactics)
        self.choose: Chooser = self._choose

    @property
    def in_fp8(self) -> bool:
        """Whether it has a use for x in fp8."""
        return isinstance(self._experts, Fp8Experts)

    def __call__(self, x: Tensor, slots: Tensor, quantized: QuantizedRows | None = None) -> ExpertOutputs:
        # Products of bf16 are exact in fp32: no rounding of the weights, whatever the choice is near to.
        if x.shape[0] > ROUTER_ROWS:
            logits = torch.mm(x, self._router.weight.t(), out_dtype=torch.float32)
        else:
            logits = skinny_linear(x, self._router.weight, ROUTER, dtype=torch.float32)
        apart = self._shared is not None and x.shape[0] >= DENSE_TOKENS
        chosen, weights = self.choose(logits, slots, self._routed if apart else self.spec)
        if self.in_fp8 and quantized is None:
            quantized = quantize_rows(x)
        base = self._shared(x, slots, quantized) if apart and self._shared is not None else None
        if isinstance(self._experts, Fp8Experts):
            assert quantized is not None, "made above"
            return self._experts(quantized, chosen, weights, base)
        return self._experts(x, chosen, weights, base)

    def _choose(self, logits: Tensor, slots: Tensor, spec: RouteSpec) -> tuple[Tensor, Tensor]:
        return route(logits, self._router.e_score_correction_bias, spec)


class _Bf16Experts:
    def __init__(self, packed: PackedExperts, tactics: TacticTable) -> None:
        self._packed = packed
        self._tactics = tactics
        self._rows = torch.arange(SINGLE_ENTRIES, dtype=torch.int32, device=packed.both.device)

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, base: Tensor | None) -> ExpertOutputs:
        """x [T, d], chosen and weights [T, k], base [T, d]."""
        both, downs = self._packed.both, self._packed.downs
        tactics = self._tactics.experts(chosen.shape, both.shape)
        if tactics.sort:
            plan = plan_rows(chosen, both.shape[0], tactics.first.rows)
        else:
            plan = single_rows(chosen, self._rows)
        inner = gate_up(x, both, plan, tactics.first, chosen.shape[1])
        return ExpertOutputs(down(inner, downs, plan, tactics.second), weights, base, None)

"""Experts by a fixed, balanced hash of (sequence, position, layer): random weights would send all tokens to a few.

A token's cache slot stands for its sequence and position. The scores of the router are computed and weigh the experts
all the same, so that nothing of a real step is left out.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.expert_routing import RouteSpec
from workers.kernels.following import follow
from workers.kernels.launcher import Launcher

_TOKENS = 8


@triton.jit
def _choose(
    logits_ptr,
    slots_ptr,
    experts_ptr,
    weights_ptr,
    num_tokens,
    layer,
    EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    SHARED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    follow()
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    present = tokens < num_tokens
    experts = tl.arange(0, EXPERTS)
    logits = tl.load(logits_ptr + tokens[:, None] * EXPERTS + experts[None, :], mask=present[:, None], other=0.0)
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    scores = powers / tl.sum(powers, 1)[:, None]
    seeds = tl.load(slots_ptr + tokens, mask=present, other=0) * 1024 + layer
    mixed = seeds.to(tl.uint32) * 0x9E3779B1
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
    mixed = mixed ^ (mixed >> 16)
    first = (mixed % EXPERTS).to(tl.int32)
    stride = (mixed // EXPERTS % (EXPERTS // 2)).to(tl.int32) * 2 + 1  # odd: no expert twice
    row: tl.constexpr = CHOSEN + SHARED
    for i in tl.static_range(CHOSEN):
        expert = (first + i * stride) % EXPERTS
        weight = tl.sum(tl.where(experts[None, :] == expert[:, None], scores, 0.0), 1)
        tl.store(experts_ptr + tokens * row + i, expert, mask=present)
        tl.store(weights_ptr + tokens * row + i, weight, mask=present)
    for i in tl.static_range(SHARED):
        tl.store(experts_ptr + tokens * row + CHOSEN + i, tl.full([TOKENS], EXPERTS, tl.int32) + i, mask=present)
        tl.store(weights_ptr + tokens * row + CHOSEN + i, tl.full([TOKENS], 1.0, tl.float32), mask=present)


_launch_choose = Launcher(_choose)


class BalancedExperts:
    """Takes the place of the learned choice of one layer. The number of experts is a power of two."""

    def __init__(self, spec: RouteSpec, layer: int) -> None:
        self._spec = spec
        self._layer = layer

    def __call__(self, logits: Tensor, slots: Tensor, spec: RouteSpec) -> tuple[Tensor, Tensor]:
        count = len(slots)
        row = spec.chosen + spec.shared
        experts = torch.empty(count, row, dtype=torch.int32, device=slots.device)
        weights = torch.empty(count, row, dtype=torch.float32, device=slots.device)
        arguments = (logits, slots, experts, weights, count, self._layer)
        constants = {"EXPERTS": spec.num_experts, "CHOSEN": spec.chosen, "SHARED": spec.shared, "TOKENS": _TOKENS}
        _launch_choose((-(-count // _TOKENS), 1, 1), arguments, constants, num_warps=4)
        return experts, weights

    def num_distinct(self, slots: Tensor) -> int:
        """Experts that the tokens at `slots` use."""
        none = torch.zeros(len(slots), self._spec.num_experts, device=slots.device)
        experts, _ = self(none, slots, self._spec)
        return len(experts[:, : self._spec.chosen].unique())

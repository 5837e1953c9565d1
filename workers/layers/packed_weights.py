"""Matrices that one product reads, side by side in memory. The parameters become views of it: nothing lies twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.layers.linear import Linear
from workers.layers.mlp import GatedMlp


class PackedLinear:
    """Several projections of one input as one. x [..., in] -> [..., sum of outs], in the order given."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.weight = torch.cat([part.weight for part in parts])
        sizes = [part.weight.shape[0] for part in parts]
        for part, view in zip(parts, self.weight.split(sizes), strict=True):
            part.weight.data = view
        self.bias: Tensor | None = None
        if any(part.bias is not None for part in parts):
            biases = [part.weight.new_zeros(size) if part.bias is None else part.bias for part, size in _sized(parts)]
            self.bias = torch.cat(biases)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def pack_experts(experts: Sequence[GatedMlp], shared: GatedMlp | None) -> tuple[Tensor, Tensor]:
    """Gates and ups [E + s, 2 I, d], downs [E + s, d, I]: a shared expert of s inner sizes takes s slots behind the
    others, and keeps matrices of its own beside them."""
    inner, d = experts[0].gate_proj.weight.shape
    extra = 0 if shared is None else shared.gate_proj.weight.shape[0] // inner
    both = experts[0].gate_proj.weight.new_empty(len(experts) + extra, 2 * inner, d)
    downs = both.new_empty(len(experts) + extra, d, inner)
    for slot, expert in enumerate(experts):
        for weight, view in (
            (expert.gate_proj.weight, both[slot, :inner]),
            (expert.up_proj.weight, both[slot, inner:]),
            (expert.down_proj.weight, downs[slot]),
        ):
            view.copy_(weight)
            weight.data = view
    if shared is not None:
        both[len(experts) :, :inner] = shared.gate_proj.weight.unflatten(0, (extra, inner))
        both[len(experts) :, inner:] = shared.up_proj.weight.unflatten(0, (extra, inner))
        downs[len(experts) :] = shared.down_proj.weight.unflatten(1, (extra, inner)).transpose(0, 1)
    return both, downs


def _sized(parts: Sequence[Linear]) -> list[tuple[Linear, int]]:
    return [(part, part.weight.shape[0]) for part in parts]

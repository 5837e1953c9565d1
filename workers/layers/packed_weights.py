"""Matrices that one product reads, side by side in memory. The parameters become views of it: nothing lies twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.dense_gemm import dense
from workers.kernels.fp8 import BLOCK
from workers.kernels.tactic_table import RULES, TacticTable
from workers.kernels.tactics import SKINNY_ROWS
from workers.layers.linear import Linear
from workers.layers.mlp import GatedMlp

if TYPE_CHECKING:
    from workers.kernels.fp8_rows import QuantizedRows


class PackedLinear:
    """Several projections of one input as one. x [..., in] -> [..., sum of outs], in the order given.

    In fp8, by DeepGEMM, where all parts are stored so and each ends with a block; else all are widened.
    """

    def __init__(self, parts: Sequence[Linear], tactics: TacticTable = RULES) -> None:
        self._tactics = tactics
        sizes = [part.weight.shape[0] for part in parts]
        self.scales = _stacked_scales(parts, sizes)
        if self.scales is None:
            for part in parts:
                part.widen()
        self.weight = _cat([part.weight for part in parts])
        for part, view in zip(parts, self.weight.split(sizes), strict=True):
            part.weight.data = view
        self.bias: Tensor | None = None
        if any(part.bias is not None for part in parts):
            biases = [part.weight.new_zeros(size) if part.bias is None else part.bias for part, size in _sized(parts)]
            self.bias = torch.cat(biases)

    def __call__(self, x: Tensor, quantized: QuantizedRows | None = None) -> Tensor:
        """`quantized`: x in fp8, from who has it already."""
        if self.scales is None:
            return self._widened(x)
        from workers.kernels.fp8_products import product
        from workers.kernels.fp8_rows import quantize_rows

        y = product(quantize_rows(x) if quantized is None else quantized, self.weight, self.scales)
        return y if self.bias is None else y + self.bias

    @property
    def is_plain(self) -> bool:
        """A matrix of bf16 and nothing else."""
        return self.scales is None and self.bias is None and self.weight.dtype == torch.bfloat16

    def absorb(self, factors: Tensor) -> None:
        """What else x would be multiplied with, factors [in], becomes part of the matrix, which is plain."""
        self.weight.mul_(factors)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """total [T, sum of outs], contiguous, += x [T, in] projected, by a plain matrix."""
        if len(x) > SKINNY_ROWS:
            dense(x, self.weight, self._tactics.dense(len(x), self.weight.shape), total)
        elif len(x):
            total += self(x)

    def behind(self, x: Tensor, first: int) -> Tensor:
        """x [T, in] -> [T, the outputs from number `first` on]. Of matrices that are not in fp8."""
        assert self.scales is None, "in fp8"
        return F.linear(x, self.weight[first:], None if self.bias is None else self.bias[first:])

    def _widened(self, x: Tensor) -> Tensor:
        if self.bias is not None or x.device.type == "cpu":
            return F.linear(x, self.weight, self.bias)
        if x.shape[0] > SKINNY_ROWS or not x.is_contiguous():
            return dense(x, self.weight, self._tactics.dense(x.shape[0], self.weight.shape))
        from workers.kernels.skinny_gemm import skinny_linear

        return skinny_linear(x, self.weight, self._tactics.skinny(self.weight.shape, gated=False))


class PackedExperts(NamedTuple):
    """A shared expert of s inner sizes takes s slots behind the others, and keeps matrices of its own beside them."""

    both: Tensor  # [E + s, 2 I, d]: gates, then ups
    downs: Tensor  # [E + s, d, I]
    both_scales: Tensor | None  # fp32 [E + s, 2 I / 128, d / 128], of e4m3 matrices; None: they are not
    downs_scales: Tensor | None  # fp32 [E + s, d / 128, I / 128]


def pack_experts(experts: Sequence[GatedMlp], shared: GatedMlp | None) -> PackedExperts:
    """In fp8 where all matrices are stored so, in whole blocks."""
    linears = [linear for mlp in (*experts, *([] if shared is None else [shared])) for linear in _linears(mlp)]
    if not all(_in_whole_blocks(linear) for linear in linears):
        for linear in linears:
            linear.widen()
    inner, d = experts[0].gate_proj.weight.shape
    extra = 0 if shared is None else shared.gate_proj.weight.shape[0] // inner
    both = experts[0].gate_proj.weight.new_empty(len(experts) + extra, 2 * inner, d)
    downs = both.new_empty(len(experts) + extra, d, inner)
    for slot, expert in enumerate(experts):
        for linear, view in zip(_linears(expert), (both[slot, :inner], both[slot, inner:], downs[slot]), strict=True):
            view.copy_(linear.weight)
            linear.weight.data = view
    if shared is not None:
        _share(both, downs, *(linear.weight for linear in _linears(shared)), first=len(experts))
    if experts[0].gate_proj.scales is None:
        return PackedExperts(both, downs, None, None)
    scales = [torch.stack(parts) for parts in zip(*(map(_scales, _linears(expert)) for expert in experts), strict=True)]
    both_scales = scales[0].new_empty(len(both), 2 * inner // BLOCK, d // BLOCK)
    downs_scales = scales[0].new_empty(len(both), d // BLOCK, inner // BLOCK)
    both_scales[: len(experts)] = torch.cat(scales[:2], 1)
    downs_scales[: len(experts)] = scales[2]
    if shared is not None:
        _share(both_scales, downs_scales, *(_scales(linear) for linear in _linears(shared)), first=len(experts))
    return PackedExperts(both, downs, both_scales, downs_scales)


def _share(both: Tensor, downs: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, first: int) -> None:
    """A shared expert's matrices, or their scales, into the slots from `first` on."""
    extra, inner = len(both) - first, both.shape[1] // 2
    both[first:, :inner] = gate.unflatten(0, (extra, inner))
    both[first:, inner:] = up.unflatten(0, (extra, inner))
    downs[first:] = down.unflatten(1, (extra, inner)).transpose(0, 1)


def _linears(mlp: GatedMlp) -> tuple[Linear, Linear, Linear]:
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _scales(linear: Linear) -> Tensor:
    assert linear.scales is not None, "not in fp8"
    return linear.scales


def _in_whole_blocks(linear: Linear) -> bool:
    return linear.scales is not None and not any(size % BLOCK for size in linear.weight.shape)


def _stacked_scales(parts: Sequence[Linear], sizes: Sequence[int]) -> Tensor | None:
    """None where one product in fp8 cannot compute the parts."""
    if any(part.scales is None or part.weight.shape[1] % BLOCK for part in parts):
        return None
    if any(size % BLOCK for size in sizes[:-1]):
        return None
    return torch.cat([_scales(part) for part in parts])


def _cat(weights: Sequence[Tensor]) -> Tensor:
    if len(weights) == 1:
        return weights[0].data
    return torch.cat(list(weights))


def _sized(parts: Sequence[Linear]) -> list[tuple[Linear, int]]:
    return [(part, part.weight.shape[0]) for part in parts]

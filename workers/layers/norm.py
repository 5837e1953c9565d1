"""Normalisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.layers.linear import Partition


class RmsNorm(nn.Module):
    """Over the last dim, in fp32, rounded to the input's dtype before the weight is applied (as checkpoints expect)."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.partition = Partition.REPLICATED
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self._fused: Callable[[Tensor, Tensor, float], Tensor] | None = None
        self._fused_sum: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] | None = None

    def fuse(self) -> None:
        """One launch for rows [T, size], on SM90."""
        from workers.kernels.norms import add_rms_norm, rms_norm

        self._fused, self._fused_sum = rms_norm, add_rms_norm

    def forward(self, x: Tensor) -> Tensor:
        if self._fused is not None:
            return self._fused(x, self.weight, self.eps)
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(self.weight)

    def of_sum(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """[T, size] each -> x + delta, and its norm."""
        if self._fused_sum is not None:
            return self._fused_sum(x, delta, self.weight, self.eps)
        total = x + delta
        return total, self(total)


class LayerNorm(nn.Module):
    """Over the last dim: mean away, unit variance, weight and bias."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.partition = Partition.REPLICATED
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self._fused_sum: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] | None = None

    def fuse(self) -> None:
        """One launch for sums [T, size], on SM90."""
        from workers.kernels.layer_norms import add_layer_norm

        self._fused_sum = add_layer_norm

    def of_sum(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """[T, size] each -> x + delta, and its norm."""
        if self._fused_sum is not None:
            return self._fused_sum(x, delta, self.weight, self.bias, self.eps)
        total = x + delta
        return total, self(total)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

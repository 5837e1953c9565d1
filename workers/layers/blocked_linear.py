"""Matrices that a CPU reads block by block: oneDNN lays a copy of the weight out for its own kernels.

Plain products of a few rows and a matrix as checkpoints have it take two to three times as long on some processors
(AMD's with AVX-512 above all). Its sums are rounded about twice as much: not for what everything else is made of. The
weight itself stays a view of the file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workers.layers.linear import Linear

_ROWS = 32  # of x: the layout is chosen for so many, and serves others


class BlockedLinear(Linear):
    """As `Linear`, which it is until `block` was called, and wherever that changes nothing."""

    _blocked: Tensor | None = None

    def block(self) -> None:
        """The weight is there and stays as it is. In float32 on a CPU only."""
        weight = self.weight
        if weight.device.type == "cpu" and weight.dtype is torch.float32 and torch.backends.mkldnn.is_available():
            self._blocked = torch.ops.mkldnn._reorder_linear_weight(weight.data, _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        if self._blocked is None:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self._blocked, self.bias, "none", [], "")


def block_all(model: nn.Module, *, but: str = "") -> None:
    """Every matrix of a model that can be, but those below modules of that name."""
    for name, module in model.named_modules():
        if isinstance(module, BlockedLinear) and but not in name.split("."):
            module.block()

"""The gated feed-forward layer. Shapes: T tokens, d hidden size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.layers.linear import Linear, Partition


class GatedMlp(nn.Module):
    """x [T, d] -> [T, d]: down(silu(gate(x)) * up(x)). Also one expert of many."""

    def __init__(self, hidden_size: int, inner_size: int, *, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, inner_size, partition=Partition.COLUMN, bias=bias, dtype=dtype)
        self.up_proj = Linear(hidden_size, inner_size, partition=Partition.COLUMN, bias=bias, dtype=dtype)
        self.down_proj = Linear(inner_size, hidden_size, partition=Partition.ROW, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))

"""Grouped-query self-attention over the paged cache. Shapes: T tokens, d hidden, H query heads, K K/V heads, D size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workers.attention.interface import AttentionStep
from workers.layers.linear import Linear, Partition
from workers.layers.rotary import Rotation


class GroupedQueryAttention(nn.Module):
    """Projects, rotates, writes the cache, attends; `layer` is its index in the cache's region."""

    def __init__(
        self,
        layer: int,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = head_dim
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = Linear(hidden_size, q_size, partition=Partition.COLUMN, bias=bias, dtype=dtype)
        self.k_proj = Linear(hidden_size, kv_size, partition=Partition.COLUMN, bias=bias, dtype=dtype)
        self.v_proj = Linear(hidden_size, kv_size, partition=Partition.COLUMN, bias=bias, dtype=dtype)
        self.o_proj = Linear(q_size, hidden_size, partition=Partition.ROW, bias=bias, dtype=dtype)

    def forward(self, x: Tensor, rotation: Rotation, step: AttentionStep) -> Tensor:
        q = rotation.apply(self._heads(self.q_proj(x)))
        k = rotation.apply(self._heads(self.k_proj(x)))
        return self.o_proj(step.attend(self.layer, q, k, self._heads(self.v_proj(x))))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

"""Grouped-query self-attention over the paged cache. Shapes: T tokens, d hidden, H query heads, K K/V heads, D size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workers.attention.interface import AttentionStep
from workers.layers.linear import Linear, Partition
from workers.layers.norm import RmsNorm
from workers.layers.rotary import Rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class GqaShape:
    hidden_size: int  # d
    num_heads: int  # H
    num_kv_heads: int  # K; divides H
    head_dim: int  # D
    input_bias: bool  # of queries, keys and values
    output_bias: bool
    norm_eps: float | None  # of a norm over each head's query and key, before they are rotated; None: no such norm


class GroupedQueryAttention(nn.Module):
    """Projects, norms where the model does, rotates, writes the cache, attends.

    `layer` is its index in the cache's region.
    """

    def __init__(self, layer: int, shape: GqaShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = shape.head_dim
        d, bias, column = shape.hidden_size, shape.input_bias, Partition.COLUMN
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = Linear(d, q_size, partition=column, bias=bias, dtype=dtype)
        self.k_proj = Linear(d, kv_size, partition=column, bias=bias, dtype=dtype)
        self.v_proj = Linear(d, kv_size, partition=column, bias=bias, dtype=dtype)
        self.o_proj = Linear(q_size, d, partition=Partition.ROW, bias=shape.output_bias, dtype=dtype)
        eps = shape.norm_eps
        self.q_norm = None if eps is None else RmsNorm(shape.head_dim, eps, dtype=dtype)
        self.k_norm = None if eps is None else RmsNorm(shape.head_dim, eps, dtype=dtype)

    def forward(self, x: Tensor, rotation: Rotation, step: AttentionStep) -> Tensor:
        q, k = self._heads(self.q_proj(x)), self._heads(self.k_proj(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotation.apply(q), rotation.apply(k)
        return self.o_proj(step.attend(self.layer, q, k, self._heads(self.v_proj(x))))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

"""Attention and feed-forwards of encoder–decoder models, whose checkpoints name their matrices in their own ways.

Shapes: T tokens, S encoder tokens, d hidden, H heads, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from workers.attention.interface import AttentionStep, CrossAttention, CrossKeys, EncoderAttention
from workers.layers.activation import Activation
from workers.layers.blocked_linear import BlockedLinear
from workers.layers.linear import Linear, Partition
from workers.layers.packed_weights import PackedLinear


class AttentionNames(NamedTuple):
    """What a checkpoint calls the four matrices."""

    query: str
    key: str
    value: str
    output: str


class HeadShape(NamedTuple):
    hidden_size: int  # d
    num_heads: int  # H
    head_dim: int  # D
    bias: bool  # of all four matrices


class HeadedAttention(nn.Module):
    """Multi-head attention without positions of its own: they come as a bias, or with the embeddings.

    One class for the three places where such a model attends.
    """

    def __init__(self, names: AttentionNames, shape: HeadShape, dtype: torch.dtype) -> None:
        super().__init__()
        self._names = names
        self._num_heads, self._head_dim = shape.num_heads, shape.head_dim
        self._packed: PackedLinear | None = None
        d, inner = shape.hidden_size, shape.num_heads * shape.head_dim
        for name in names[:3]:
            column = BlockedLinear(d, inner, partition=Partition.COLUMN, bias=shape.bias, dtype=dtype)
            self.add_module(name, column)
        self.add_module(names.output, BlockedLinear(inner, d, partition=Partition.ROW, bias=shape.bias, dtype=dtype))

    def fuse(self) -> None:
        """One product for queries, keys and values, and one for keys and values alone: for SM90."""
        self._packed = PackedLinear([_linear(self, name) for name in self._names[:3]])

    def encode(self, x: Tensor, step: EncoderAttention) -> Tensor:
        """x [T, d] -> [T, d], within the encoder's inputs."""
        return self._output(step.attend(*self._all_heads(x)))

    def decode(self, layer: int, x: Tensor, step: AttentionStep) -> Tensor:
        """x [T, d] -> [T, d], causal; keeps the keys and values in `layer` of the cache."""
        return self._output(step.attend(layer, *self._all_heads(x)))

    def read(self, layer: int, x: Tensor, step: CrossAttention) -> Tensor:
        """x [T, d] -> [T, d], from the decoder to what `keep` wrote."""
        return self._output(step.attend(layer, self._heads(self._names.query, x)))

    def keep(self, layer: int, states: Tensor, writer: CrossKeys) -> None:
        """Encoder states [S, d] -> keys and values in `layer` of the cache."""
        if self._packed is None:
            writer.write(layer, self._heads(self._names.key, states), self._heads(self._names.value, states))
        else:
            both = self._packed.behind(states, self._num_heads * self._head_dim)
            writer.write(layer, *both.unflatten(-1, (2, -1, self._head_dim)).unbind(1))

    def _all_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each [T, H, D]."""
        if self._packed is None:
            return tuple(self._heads(name, x) for name in self._names[:3])
        return self._packed(x).unflatten(-1, (3, -1, self._head_dim)).unbind(1)

    def _heads(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(name)(x).unflatten(-1, (-1, self._head_dim))

    def _output(self, x: Tensor) -> Tensor:
        return self.get_submodule(self._names.output)(x)


class FeedForward(nn.Module):
    """Up, activation, down; with two names to go up, the second's output is multiplied by the activated first's."""

    def __init__(
        self,
        up_names: tuple[str, ...],
        down_name: str,
        sizes: tuple[int, int],
        activation: Activation,
        *,
        bias: bool,
        dtype: torch.dtype,
    ) -> None:
        """`sizes`: d, and the inner one."""
        super().__init__()
        d, inner = sizes
        self._up_names, self._down_name, self._activation = up_names, down_name, activation
        self._packed: PackedLinear | None = None
        for name in up_names:
            self.add_module(name, BlockedLinear(d, inner, partition=Partition.COLUMN, bias=bias, dtype=dtype))
        self.add_module(down_name, BlockedLinear(inner, d, partition=Partition.ROW, bias=bias, dtype=dtype))

    def fuse(self) -> None:
        """One product to go up."""
        self._packed = PackedLinear([_linear(self, name) for name in self._up_names])

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is None:
            gate, *others = (self.get_submodule(name)(x) for name in self._up_names)
        else:
            gate, *others = self._packed(x).chunk(len(self._up_names), -1)
        inner = self._activation(gate)
        for other in others:
            inner = inner * other
        return self.get_submodule(self._down_name)(inner)


def _linear(module: nn.Module, name: str) -> Linear:
    found = module.get_submodule(name)
    assert isinstance(found, Linear)
    return found

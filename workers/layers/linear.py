"""Matrices of a model, and how each is split over tensor-parallel ranks."""

from __future__ import annotations

from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.layers.block_fp8 import BlockMatrix, dequantize_matrix


class Partition(StrEnum):
    """Which dim of the weight tensor-parallel ranks share out; the loader slices by it."""

    COLUMN = "column"  # dim 0: output features (and the bias), or the tokens of an embedding
    ROW = "row"  # dim 1: input features
    REPLICATED = "replicated"


class Linear(nn.Module):
    """x [..., in] -> [..., out]. The weight [out, in] lies as in checkpoints, so that it can be a view of the file.

    With `scales`, fp32 [ceil(out / 128), ceil(in / 128)], it is in fp8 blocks, and computes as what they stand for.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        partition: Partition,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.partition = partition
        self.dtype = dtype or torch.get_default_dtype()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.scales: Tensor | None = None
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(), self.bias)

    def matrix(self) -> Tensor:
        """The weight in the layer's dtype, whatever it is stored in."""
        if self.scales is None:
            return self.weight
        return dequantize_matrix(BlockMatrix(self.weight, self.scales), self.dtype)

    def widen(self) -> None:
        """Gives up fp8."""
        if self.scales is not None:
            self.weight.data = self.matrix()
            self.scales = None


class Embedding(nn.Module):
    """ids [T] int64 -> [T, d]; `project` is the transposed use as a head, [N, d] -> [N, num_embeddings]."""

    def __init__(
        self,
        num_embeddings: int,
        hidden_size: int,
        *,
        partition: Partition = Partition.COLUMN,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.partition = partition
        self.weight = nn.Parameter(torch.empty(num_embeddings, hidden_size, dtype=dtype), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def project(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)

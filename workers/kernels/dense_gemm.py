"""Products of many rows with one matrix. References: torch.nn.functional.linear and torch.addmm, which are cuBLAS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.cublas_lt import lt_linear
from workers.kernels.tactics import LtKernel

_ALIGNED = 16  # bytes, of each row: else the copy engine does not take them


def dense(x: Tensor, weight: Tensor, kernel: LtKernel | None, total: Tensor | None = None) -> Tensor:
    """x [T, m], weight [n, m] contiguous -> [T, n]; with `total` [T, n], contiguous, it is added there, and rounded
    once. Without a kernel, and for rows that none takes, as cuBLAS likes.
    """
    if kernel is None or x.dtype is not torch.bfloat16 or not len(x) or not _aligned(x, weight):
        return F.linear(x, weight) if total is None else total.addmm_(x, weight.t())
    return lt_linear(x, weight, kernel, total)


def _aligned(x: Tensor, weight: Tensor) -> bool:
    return x.stride(1) == 1 and not (x.data_ptr() | 2 * x.stride(0) | weight.data_ptr()) % _ALIGNED

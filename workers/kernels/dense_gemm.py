"""Products of many rows with one matrix. Reference: torch.nn.functional.linear, which is cuBLAS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.cublas_lt import lt_linear
from workers.kernels.tactics import LtKernel

_ALIGNED = 16  # bytes, of each row: else the copy engine does not take them


def dense(x: Tensor, weight: Tensor, kernel: LtKernel | None) -> Tensor:
    """x [T, m], weight [n, m] contiguous -> [T, n]. Without a kernel, and for rows that none takes, as cuBLAS likes."""
    if kernel is None or x.dtype is not torch.bfloat16 or not len(x):
        return F.linear(x, weight)
    if x.stride(1) != 1 or (x.data_ptr() | 2 * x.stride(0) | weight.data_ptr()) % _ALIGNED:
        return F.linear(x, weight)
    return lt_linear(x, weight, kernel)

"""Products in fp8 by DeepGEMM. Reference: workers.layers.block_fp8.

Kernels are compiled when a shape is first computed, for seconds; the files of a cache folder serve later processes.
Shapes: T rows, n outputs, m inputs, P rows in tiles, E slots.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import deep_gemm
import torch
from torch import Tensor

from workers.kernels.fp8_grouped_gemm import ExpertMatrices
from workers.kernels.fp8_rows import QuantizedRows, TiledRows


def product(x: QuantizedRows, values: Tensor, scales: Tensor) -> Tensor:
    """x [T, m], values [n, m] e4m3, scales [ceil(n / 128), m / 128] -> bf16 [T, n]."""
    out = torch.empty(len(x.values), len(values), dtype=torch.bfloat16, device=values.device)
    if len(out):
        deep_gemm.fp8_gemm_nt((x.values, x.scales), (values, scales), out)
    return out


def tiled_product(x: TiledRows, weights: ExpertMatrices) -> Tensor:
    """x [P, m], weights [E, n, m] -> bf16 [P, n]; what comes of rows that hold anything means nothing."""
    out = torch.empty(len(x.rows.values), weights.values.shape[1], dtype=torch.bfloat16, device=x.experts.device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        (x.rows.values, x.rows.scales), (weights.values, weights.scales), out, x.experts
    )
    return out

"""Products in fp8, in plain torch: what the kernels are measured against, and what computes where there are none.

A matrix is e4m3 with one fp32 scale for each 128 x 128 block, as DeepSeek V3 is published; rows of activations are
e4m3 with one scale for each 128 features. Shapes: T rows, n outputs, m inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workers.kernels.fp8 import BLOCK, LARGEST, SMALLEST


class BlockMatrix(NamedTuple):
    values: Tensor  # [n, m] e4m3
    scales: Tensor  # [ceil(n / 128), ceil(m / 128)] fp32; blocks at the end may be ragged


def quantize_matrix(weight: Tensor) -> BlockMatrix:
    """weight [n, m]: the largest of each block becomes the largest of e4m3."""
    n, m = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -m % BLOCK, 0, -n % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [rows, 128, columns, 128]
    scales = blocks.abs().amax((1, 3)).clamp(min=SMALLEST) / LARGEST
    values = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return BlockMatrix(values.flatten(2).flatten(0, 1)[:n, :m].contiguous(), scales)


def dequantize_matrix(matrix: BlockMatrix, dtype: torch.dtype) -> Tensor:
    """[n, m]: the product in fp32, rounded once."""
    n, m = matrix.values.shape
    scales = matrix.scales.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :m]
    return (matrix.values.float() * scales).to(dtype)


def quantize_rows(x: Tensor) -> BlockMatrix:
    """x [T, m], m a multiple of 128 -> values [T, m] and scales [T, m / 128]."""
    groups = x.float().unflatten(-1, (-1, BLOCK))
    scales = groups.abs().amax(-1).clamp(min=SMALLEST) / LARGEST
    return BlockMatrix((groups / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2), scales)


def dequantize_rows(rows: BlockMatrix) -> Tensor:
    """[T, m] fp32."""
    return (rows.values.float().unflatten(-1, (-1, BLOCK)) * rows.scales.unsqueeze(-1)).flatten(-2)


def product(x: Tensor, matrix: BlockMatrix) -> Tensor:
    """x [T, m] -> [T, n]: rows quantised, their product in fp32, rounded once."""
    wide = dequantize_rows(quantize_rows(x))
    return (wide @ dequantize_matrix(matrix, torch.float32).t()).to(x.dtype)

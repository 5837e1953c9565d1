"""Checkpoints whose matrices are fp8 with one scale per block: DeepSeek V3's format. They are dequantised on load, but
for those that multiply as they are (workers.layers.gemm_resolver).

A matrix [n, m] stored as float8_e4m3fn has a companion `<name>_scale_inv` [ceil(n / rows), ceil(m / columns)] fp32;
its value is fp8 * scale. Which matrices are quantised, the stored dtypes say.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from workers.models.fields import ConfigFields

SCALE_SUFFIX = "_scale_inv"
STORED = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class BlockFp8:
    """Sizes of a block."""

    rows: int
    columns: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Of the scales of a matrix [n, m]; blocks at the end may be ragged."""
        n, m = shape
        return ceil(n / self.rows), ceil(m / self.columns)

    def dequantize(self, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """values [n, m] fp8, scales fp32 -> [n, m]: the product in fp32, rounded once. One row of blocks at a time."""
        result = torch.empty(values.shape, dtype=dtype)
        for i, row_scales in enumerate(scales):
            rows = slice(i * self.rows, (i + 1) * self.rows)
            by_column = row_scales.float().repeat_interleave(self.columns)[: values.shape[1]]
            result[rows] = values[rows].float() * by_column
        return result


def read_quantization(fields: ConfigFields) -> BlockFp8 | None:
    """None for weights as they are. Raises CheckpointError for any other method."""
    section = fields.section("quantization_config")
    if section is None:
        return None
    if section.text("quant_method", "") != "fp8":
        section.refuse("quant_method", "only fp8 in blocks is computed; convert the weights to bfloat16")
    section.expect("fmt", "e4m3", "convert the weights to bfloat16")
    section.expect("activation_scheme", "dynamic", "stored scales of activations are not read")
    block = section.integers("weight_block_size")
    if len(block) != 2 or 0 in block:
        section.refuse("weight_block_size", "must be the rows and columns of a block, as in [128, 128]")
    # Which modules: the stored dtypes say. scale_fmt: scales are stored as numbers whatever their format was.
    section.close(("dequantize", "ignored_layers", "modules_to_not_convert", "scale_fmt"))
    return BlockFp8(*block)

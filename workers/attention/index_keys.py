"""Index keys in fp8, as a page holds them: [S, J] e4m3, then [S] fp32 scales, one of each row. Plain torch.

Shapes: T tokens, S block size, J index head size, M blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvtransfer.layout import PageFormat, RegionSpec
from workers.kernels.fp8 import LARGEST, SMALLEST

HEAD_DIM = 128  # of keys that are kept in fp8
_SCALE_BYTES = 4


def index_key_region(name: str, num_layers: int, block_size: int, head_dim: int, dtype: str) -> RegionSpec:
    """In fp8 where a model of 16-bit weights has keys of the size that kernels read, else as rows of the model's dtype.

    A rule of the model alone, so that all workers that exchange blocks keep the same bytes.
    """
    if head_dim == HEAD_DIM and dtype in ("bfloat16", "float16"):
        return RegionSpec(
            name=name,
            num_layers=num_layers,
            page_format=PageFormat.FP8_VALUES_THEN_SCALES,
            dtype="float8_e4m3fn",
            block_size=block_size,
            row_size=head_dim,
            scales_per_row=1,
        )
    return RegionSpec(
        name=name,
        num_layers=num_layers,
        page_format=PageFormat.ROWS,
        dtype=dtype,
        block_size=block_size,
        row_size=head_dim,
    )


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[..., J] -> e4m3 [..., J] and fp32 scales [...]: their product is about the row."""
    wide = rows.float()
    scales = wide.abs().amax(-1).clamp_(min=SMALLEST) / LARGEST
    return (wide / scales.unsqueeze(-1)).to(torch.float8_e4m3fn), scales


def write_pages(pages: Tensor, layer: int, slots: Tensor, keys: Tensor) -> None:
    """keys [T, J] to `slots` [T] of one layer of pages uint8 [blocks, layers, S * (J + 4)]."""
    values, scales = quantize_rows(keys)
    size, width = keys.shape[1], pages.shape[2]
    block_size = width // (size + _SCALE_BYTES)
    starts = (slots // block_size * pages.shape[1] + layer) * width
    flat = pages.view(-1)
    offsets = slots % block_size
    flat[(starts + offsets * size)[:, None] + torch.arange(size, device=slots.device)] = values.view(torch.uint8)
    at_scale = starts + block_size * size + offsets * _SCALE_BYTES
    places = at_scale[:, None] + torch.arange(_SCALE_BYTES, device=slots.device)
    flat[places] = scales.contiguous().view(torch.uint8).view(-1, _SCALE_BYTES)


def gather_pages(pages: Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The keys of whole pages: rows [M] of pages seen as [blocks * layers, …] -> e4m3 [M * S, J], fp32 [M * S]."""
    copies = pages.view(-1, pages.shape[2]).index_select(0, rows)
    values = copies.shape[1] // (size + _SCALE_BYTES) * size
    keys = copies[:, :values].contiguous().view(torch.float8_e4m3fn).view(-1, size)
    return keys, copies[:, values:].contiguous().view(torch.float32).flatten()

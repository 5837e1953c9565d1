"""Checkpoints in block fp8, written by hand, and what they mean in fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 128
WEIGHTS = "model.safetensors"


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[n, m] -> e4m3 [n, m], scales fp32: the largest value of each block becomes the largest of e4m3, 448."""
    n, m = weight.shape
    values = torch.empty(n, m, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-n // BLOCK), -(-m // BLOCK))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scales[i, j] = weight[block].abs().max() / 448
            values[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """One block at a time."""
    result = torch.empty(values.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            result[block] = values[block].float() * scales[i, j]
    return result


def write_pair(source: Path, fp8: Path, meant: Path) -> None:
    """From a checkpoint in fp32: the same in fp8, as DeepSeek V3 is published, and the fp32 that this stands for."""
    stored: dict[str, Tensor] = {}
    rounded: dict[str, Tensor] = {}
    for name, tensor in load_file(source / WEIGHTS).items():
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            stored[name], stored[name + "_scale_inv"] = quantize(tensor)
            rounded[name] = dequantize(stored[name], stored[name + "_scale_inv"])
        else:
            stored[name] = rounded[name] = tensor
    for folder, tensors in ((fp8, stored), (meant, rounded)):
        shutil.copytree(source, folder)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    (fp8 / "config.json").write_text(json.dumps(config))

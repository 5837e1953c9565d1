"""Block fp8: values against their definition, one element at a time; every way a checkpoint can lack a part."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.errors import CheckpointError
from tests.support.checkpoints import checkpoint
from tests.support.fp8_blocks import WEIGHTS, dequantize
from workers.models.loader import load
from workers.models.quantization import BlockFp8

FAMILY = "deepseek-v3-wide-fp8"
GATE = "model.layers.0.mlp.gate_proj.weight"  # [288, 160]: 3 x 2 blocks, the last ones ragged


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint(FAMILY), tmp_path / "copy"))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_quantization(folder: Path, changes: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("shape", [(6, 8), (7, 8), (6, 7), (1, 1), (5, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_is_value_times_scale_of_its_block(shape: tuple[int, int], dtype: torch.dtype) -> None:
    block = BlockFp8(3, 4)
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(block.scale_shape(shape), generator=generator) + 0.1
    got = block.dequantize(values, scales, dtype)
    assert got.dtype == dtype and got.shape == shape
    for i in range(shape[0]):
        for j in range(shape[1]):
            assert got[i, j] == (values[i, j].float() * scales[i // 3, j // 4]).to(dtype)


def test_loaded_matrices_are_what_was_meant_others_stay_mapped() -> None:
    model = load(checkpoint(FAMILY)).model
    stored = load_file(checkpoint(FAMILY) / WEIGHTS)
    loaded = model.state_dict()  # pyright: ignore
    quantized = [name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(quantized) > 30 and stored[GATE + "_scale_inv"].shape == (3, 2)
    for name in quantized:
        assert torch.equal(loaded[name], dequantize(stored[name], stored[name + "_scale_inv"]))
    plain = [tensor for name, tensor in loaded.items() if name not in quantized]
    assert len({tensor.untyped_storage().data_ptr() for tensor in plain}) == 1
    halves = load(checkpoint(FAMILY), dtype="bfloat16").model.state_dict()  # pyright: ignore
    assert torch.equal(halves[GATE], loaded[GATE].bfloat16())


def test_scales_of_a_missing_or_wrong_kind_are_named(folder: Path) -> None:
    scales = GATE + "_scale_inv"
    kept = load_file(folder / WEIGHTS)[scales]
    for change, parts in (
        (None, (f"tensor {scales} missing", "download it again")),
        (kept[:2], (f"tensor {scales} has shape [2, 2]", "[3, 2]")),
        (kept.to(torch.int32), (f"tensor {scales} is stored as torch.int32",)),
    ):
        edit_weights(
            folder, lambda tensors, new=change: tensors.pop(scales) if new is None else tensors.update({scales: new})
        )
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        assert str(folder / WEIGHTS) in str(caught.value)
        assert [part for part in parts if part not in str(caught.value)] == []


def test_scales_without_an_fp8_matrix_are_unknown(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({GATE: torch.ones(288, 160)}))
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight_scale_inv unknown"):
        load(folder)


def test_fp8_where_it_has_no_meaning(folder: Path) -> None:
    norm = "model.norm.weight"
    edit_weights(folder, lambda tensors: tensors.update({norm: tensors[norm].to(torch.float8_e4m3fn)}))
    edit_weights(folder, lambda tensors: tensors.update({norm + "_scale_inv": torch.ones(2, 1)}))
    with pytest.raises(CheckpointError, match=f"tensor {norm} is in fp8 and no matrix"):
        load(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"_scale_inv.* unknown"):
        load(folder)
    edit_weights(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")])
    with pytest.raises(CheckpointError, match=r"stored as torch\.float8_e4m3fn; .* quantization_config"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "quantization_config.quant_method = 'awq'; only fp8 in blocks"),
        ({"quant_method": None}, "quantization_config.quant_method = None; only fp8 in blocks"),
        ({"fmt": "e5m2"}, "quantization_config.fmt = 'e5m2'"),
        ({"activation_scheme": "static"}, "quantization_config.activation_scheme = 'static'"),
        ({"weight_block_size": None}, "quantization_config.weight_block_size = None; must be the rows and columns"),
        ({"weight_block_size": [128]}, "weight_block_size = [128]"),
        ({"weight_block_size": [0, 128]}, "weight_block_size = [0, 128]"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "quantization_config.kv_cache_scheme"),
    ],
)
def test_other_methods_are_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    edit_quantization(folder, changes)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert message in str(caught.value) and str(folder / "config.json") in str(caught.value)


def test_settings_that_change_nothing_are_let_through(folder: Path) -> None:
    edit_quantization(folder, {"scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"], "ignored_layers": None})
    assert load(folder).model.spec.dtype == "float32"

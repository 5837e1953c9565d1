"""Matrices in fp8 blocks, without a GPU: the rounding, what computes with them, who keeps them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F

from cluster.errors import ConfigError
from tests.support.checkpoints import checkpoint
from tests.support.fp8_blocks import dequantize, quantize
from workers.attention.environment import Environment
from workers.layers.block_fp8 import (
    BlockMatrix,
    dequantize_matrix,
    dequantize_rows,
    product,
    quantize_matrix,
    quantize_rows,
)
from workers.layers.gemm_resolver import GemmChoice, GemmProblem, resolve_gemm
from workers.layers.linear import Linear, Partition
from workers.layers.mlp import GatedMlp
from workers.layers.packed_weights import PackedLinear, pack_experts
from workers.models.deepseek import DeepseekForCausalLM
from workers.models.loader import load

BF16 = torch.bfloat16
FAMILY = "deepseek-v3-wide-fp8"
LIBRARIES = (("deep_gemm", "0.1.4"), ("triton", "3.6"))
H200 = Environment("cuda", (9, 0), "NVIDIA H200", 132, LIBRARIES)
PROBLEM = GemmProblem((128, 128), BF16)


@pytest.mark.parametrize("shape", [(128, 256), (300, 260), (1, 5)])
def test_matrices_are_quantised_block_by_block(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, (values, scales) = quantize_matrix(weight), quantize(weight)
    assert torch.allclose(ours.scales, scales, rtol=1e-6)
    assert torch.equal(dequantize_matrix(BlockMatrix(values, scales), torch.float32), dequantize(values, scales))
    assert (dequantize_matrix(ours, torch.float32) - weight).norm() < 0.04 * weight.norm()


def test_rows_are_quantised_128_features_at_a_time() -> None:
    x = torch.randn(7, 384, generator=torch.Generator().manual_seed(2))
    x[3, 128:256] = 0
    x[4, 7] = 3000.0
    rows = quantize_rows(x)
    assert rows.values.shape == x.shape and rows.scales.shape == (7, 3)
    for row in range(7):
        for group in range(3):
            mine = slice(group * 128, (group + 1) * 128)
            assert rows.scales[row, group] == x[row, mine].abs().max().clamp(min=1e-4) / 448
            assert torch.equal(rows.values[row, mine], (x[row, mine] / rows.scales[row, group]).to(torch.float8_e4m3fn))
    wide = dequantize_rows(rows)
    assert not wide[3, 128:256].any() and wide[4, 7] == 3000
    assert (wide - x).abs().max() < 3000 / 448 * 16  # half a step of the largest


def test_a_product_is_that_of_both_rounded() -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(5, 256, generator=generator), torch.randn(200, 256, generator=generator)
    matrix = quantize_matrix(weight)
    y = product(x, matrix)
    assert torch.equal(y, dequantize_rows(quantize_rows(x)) @ dequantize_matrix(matrix, torch.float32).t())
    assert 0.01 < (y - x @ weight.t()).norm() / (x @ weight.t()).norm() < 0.06


def linear(out: int, inputs: int, seed: int, *, in_fp8: bool = True) -> Linear:
    layer = Linear(inputs, out, partition=Partition.COLUMN, dtype=BF16)
    layer.weight.data = torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)).to(BF16)
    if in_fp8:
        layer.weight.data, layer.scales = quantize_matrix(layer.weight)
    return layer


def test_a_layer_computes_as_what_its_blocks_stand_for() -> None:
    layer = linear(130, 200, 4)
    meant = layer.matrix()
    x = torch.randn(3, 200).to(BF16)
    assert layer.weight.dtype == torch.float8_e4m3fn and meant.dtype == BF16
    assert torch.equal(layer(x), F.linear(x, meant))
    layer.widen()
    assert layer.scales is None and torch.equal(layer.weight, meant) and torch.equal(layer(x), F.linear(x, meant))


@pytest.mark.parametrize(
    ("sizes", "inputs", "mixed", "stays"),
    [
        ((256, 128, 60), 256, False, True),
        ((256, 60, 128), 256, False, False),  # a block over two matrices
        ((256, 128), 200, False, False),
        ((256, 128), 256, True, False),
    ],
)
def test_packed_matrices_stay_in_fp8_where_blocks_do_not_straddle_them(
    sizes: tuple[int, ...], inputs: int, mixed: bool, stays: bool
) -> None:
    parts = [linear(size, inputs, seed, in_fp8=not (mixed and seed == 0)) for seed, size in enumerate(sizes)]
    meant = torch.cat([part.matrix() for part in parts])
    packed = PackedLinear(parts)
    assert (packed.scales is not None) == stays
    if packed.scales is None:
        assert torch.equal(packed.weight, meant)
        assert [part.weight.dtype for part in parts] == [BF16] * len(parts)
    else:
        assert torch.equal(dequantize_matrix(BlockMatrix(packed.weight, packed.scales), BF16), meant)
        assert parts[1].weight.data_ptr() == packed.weight[sizes[0]].data_ptr()
    assert torch.equal(torch.cat([part.matrix() for part in parts]), meant)


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 40])
def test_packed_matrices_absorb_factors_and_add_what_they_project(rows: int) -> None:
    parts = [linear(size, 48, seed, in_fp8=False) for seed, size in enumerate((32, 16))]
    meant = torch.cat([part.matrix() for part in parts]).float()
    packed, draw = PackedLinear(parts), torch.Generator().manual_seed(rows)
    assert packed.is_plain
    factors = torch.randn(48, generator=draw).to(BF16)
    packed.absorb(factors)
    assert torch.equal(packed.weight, (meant * factors.float()).to(BF16))
    assert torch.equal(parts[1].weight, packed.weight[32:])
    x, total = torch.randn(rows, 48, generator=draw).to(BF16), torch.randn(rows, 48, generator=draw).to(BF16)
    want = total.float() + x.float() @ packed.weight.float().t()
    packed.add_to(total, x)
    torch.testing.assert_close(total.float(), want, rtol=1e-2, atol=1e-2)


def test_only_matrices_of_bf16_without_bias_are_plain() -> None:
    assert not PackedLinear([linear(128, 128, 0)]).is_plain
    assert not PackedLinear([Linear(16, 16, partition=Partition.COLUMN, bias=True, dtype=BF16)]).is_plain
    assert not PackedLinear([Linear(16, 16, partition=Partition.COLUMN, dtype=torch.float32)]).is_plain


def experts_of(inner: int, hidden: int, count: int) -> list[GatedMlp]:
    mlps = [GatedMlp(hidden, inner, dtype=BF16) for _ in range(count)]
    for seed, mlp in enumerate(mlps):
        for part, (name, out, inputs) in enumerate(
            (("gate_proj", inner, hidden), ("up_proj", inner, hidden), ("down_proj", hidden, inner))
        ):
            setattr(mlp, name, linear(out, inputs, 3 * seed + part))
    return mlps


@pytest.mark.parametrize("inner", [128, 96])
def test_packed_experts_hold_what_each_has(inner: int) -> None:
    experts, (shared,) = experts_of(inner, 256, 3), experts_of(2 * inner, 256, 1)
    meant = [[part.matrix() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)] for mlp in (*experts, shared)]
    packed = pack_experts(experts, shared)
    both, downs = packed.both, packed.downs
    assert (packed.both_scales is None) == (inner == 96)
    if packed.both_scales is not None and packed.downs_scales is not None:
        both, downs = (
            torch.stack([dequantize_matrix(BlockMatrix(*each), BF16) for each in zip(*pair, strict=True)])
            for pair in ((packed.both, packed.both_scales), (packed.downs, packed.downs_scales))
        )
    for slot, (gate, up, down) in enumerate(meant[:3]):
        assert torch.equal(both[slot], torch.cat((gate, up))) and torch.equal(downs[slot], down)
    gate, up, down = meant[3]
    assert torch.equal(both[3:, :inner].flatten(0, 1), gate) and torch.equal(both[3:, inner:].flatten(0, 1), up)
    assert torch.equal(downs[3:].transpose(0, 1).flatten(1), down)


@pytest.mark.parametrize(
    ("problem", "environment", "reason"),
    [
        (PROBLEM, replace(H200, capability=(10, 0)), "runs on SM90, not on SM100"),
        (PROBLEM, replace(H200, libraries=LIBRARIES[1:]), "deep_gemm is not installed"),
        (PROBLEM, replace(H200, libraries=LIBRARIES[:1]), "triton is not installed"),
        (PROBLEM, replace(H200, disabled=frozenset({"deep_gemm"})), "deep_gemm is switched off"),
        (replace(PROBLEM, block=(64, 128)), H200, "blocks of 128 x 128, not 64 x 128"),
        (replace(PROBLEM, dtype=torch.float16), H200, "computes bfloat16, not float16"),
    ],
)
def test_blocks_are_widened_where_they_cannot_multiply(
    problem: GemmProblem, environment: Environment, reason: str
) -> None:
    choice = resolve_gemm(problem, environment)
    assert choice == GemmChoice("dequantized", (("deep_gemm", reason),))
    assert str(choice) == f"fp8 blocks: dequantized; not deep_gemm: {reason}"
    with pytest.raises(ConfigError, match="would be widened"):
        resolve_gemm(problem, replace(environment, strict=True))


def test_blocks_stay_on_hopper_and_a_cpu_says_nothing_of_them() -> None:
    assert resolve_gemm(PROBLEM, replace(H200, strict=True)) == GemmChoice("deep_gemm")
    assert resolve_gemm(PROBLEM, Environment("cpu", strict=True)) == GemmChoice("dequantized")


def logits_of(folder: Path, environment: Environment | None) -> tuple[DeepseekForCausalLM, list[torch.dtype]]:
    model = cast(DeepseekForCausalLM, load(folder, dtype="bfloat16", environment=environment).model)
    return model, [weight.dtype for weight in model.state_dict().values()]


def test_a_checkpoint_keeps_its_blocks_where_they_multiply() -> None:
    folder = checkpoint(FAMILY)
    kept, dtypes = logits_of(folder, H200)
    widened, others = logits_of(folder, Environment("cpu"))
    assert dtypes.count(torch.float8_e4m3fn) > 30 and torch.float8_e4m3fn not in others
    ours, theirs = (dict(model.named_modules()) for model in (kept, widened))
    for name, layer in ours.items():
        if isinstance(layer, Linear):
            other = theirs[name]
            assert isinstance(other, Linear) and torch.equal(layer.matrix(), other.weight)
            if name == "lm_head" or name.endswith("mlp.gate"):
                assert layer.scales is None


def test_dummies_of_a_checkpoint_in_blocks_are_in_blocks_where_they_multiply(tmp_path: Path) -> None:
    shutil.copy(checkpoint(FAMILY) / "config.json", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    models = [
        cast(DeepseekForCausalLM, load(tmp_path, dtype="bfloat16", load_format="dummy", environment=each).model)
        for each in (H200, None)
    ]
    kept, drawn = (dict(model.named_modules()) for model in models)
    layers = [
        (layer, drawn[name]) for name, layer in kept.items() if isinstance(layer, Linear) and layer.scales is not None
    ]
    assert len(layers) > 30
    for layer, other in layers:
        assert isinstance(other, Linear) and other.scales is None
        assert torch.equal(layer.weight.float(), quantize_matrix(other.weight).values.float())

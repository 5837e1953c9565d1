"""Matrices in fp8 blocks on the GPU: kernels against their torch references, and a model that keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvtransfer.layout import KvGeometry, RankLayout
from kvtransfer.pool import KvPool
from tests.gpu.test_kernels import BF16, CUDA, error, norm_of, random
from tests.gpu.test_models import BLOCK, LITE, NUM_BLOCKS, STEPS, agreement, batch_of
from workers.attention.environment import Environment
from workers.attention.kv_views import kv_cache
from workers.kernels.tactics import ExpertTactic, ExpertTactics, fp8_expert_tactics
from workers.layers import block_fp8 as reference
from workers.models.deepseek import DeepseekForCausalLM
from workers.models.loader import load

pytestmark = pytest.mark.gpu


def same_rows(values: Tensor, scales: Tensor, want: reference.BlockMatrix) -> bool:
    """But for the last bit of a scale, which may round a value to its neighbour."""
    ours = reference.dequantize_rows(reference.BlockMatrix(values, scales))
    return error(ours, reference.dequantize_rows(want)) < 2e-3 and error(scales, want.scales) < 1e-6


@pytest.mark.parametrize(("rows", "size"), [(1, 128), (3, 1408), (130, 2048), (5, 7168)])
def test_quantised_rows(rows: int, size: int) -> None:
    from workers.kernels.fp8_rows import quantize_rows, silu_mul_quantized
    from workers.kernels.norms import rms_norm_quantized

    x, norm = random(rows, size + 64)[:, :size], norm_of(size)
    assert same_rows(*quantize_rows(x), reference.quantize_rows(x))
    zeros = quantize_rows(torch.zeros(rows, size, dtype=BF16, device=CUDA))
    assert not zeros.values.float().any() and (zeros.scales > 0).all()
    x = random(rows, size)
    both = random(rows, 2 * size)
    inner = (F.silu(both[:, :size].float()).to(BF16).float() * both[:, size:].float()).to(BF16)
    assert same_rows(*silu_mul_quantized(both), reference.quantize_rows(inner))
    for delta in (None, random(rows, size)):
        total, normed, quantized = rms_norm_quantized(x, delta, norm.weight, norm.eps)
        assert torch.equal(total, x if delta is None else x + delta)
        assert error(normed, norm(total)) < 3e-3
        assert same_rows(*quantized, reference.quantize_rows(normed))


@pytest.mark.parametrize(("rows", "d", "outputs"), [(1, 2048, 576), (77, 1408, 2048), (300, 256, 3648)])
def test_dense_products(rows: int, d: int, outputs: int) -> None:
    from workers.kernels.fp8_products import product
    from workers.kernels.fp8_rows import quantize_rows

    x, matrix = random(rows, d), reference.quantize_matrix(random(outputs, d))
    want = reference.product(x.float(), matrix)
    assert error(product(quantize_rows(x), *matrix), want) < 4e-3


TACTICS = [
    ExpertTactics(ExpertTactic(16, 128, 128, 4, 3), ExpertTactic(16, 64, 128, 4, 4)),
    ExpertTactics(ExpertTactic(32, 128, 128, 8, 3), ExpertTactic(32, 128, 128, 4, 3)),
]


@pytest.mark.parametrize("tactics", [None, *TACTICS])
@pytest.mark.parametrize(
    ("tokens", "experts", "per_token", "d", "inner"),
    [(1, 9, 3, 256, 128), (77, 9, 4, 384, 256), (900, 12, 8, 512, 384)],
)
def test_experts(tokens: int, experts: int, per_token: int, d: int, inner: int, tactics: ExpertTactics | None) -> None:
    from workers.kernels.fp8_rows import quantize_rows
    from workers.kernels.norms import finalize_rms_norm
    from workers.kernels.tactic_table import TacticTable, experts_key
    from workers.layers.fp8_experts import Fp8Experts
    from workers.layers.packed_weights import PackedExperts

    torch.manual_seed(0)
    pairs = [reference.quantize_matrix(random(2 * inner, d) * 0.1) for _ in range(experts)]
    downs = [reference.quantize_matrix(random(d, inner) * 0.1) for _ in range(experts)]
    parts = [torch.stack(each) for each in (*zip(*pairs, strict=True), *zip(*downs, strict=True))]
    packed = PackedExperts(parts[0], parts[2], parts[1], parts[3])
    x = random(tokens, d)
    slots = torch.stack([torch.randperm(experts, device=CUDA)[:per_token] for _ in range(tokens)]).int()
    weights, base = torch.rand(tokens, per_token, device=CUDA), random(tokens, d)
    want = base.float()
    for slot in range(experts):
        gates = reference.product(x, pairs[slot])
        inner_rows = (F.silu(gates[:, :inner].float()).to(BF16).float() * gates[:, inner:].float()).to(BF16)
        out = reference.product(inner_rows, downs[slot]).float()
        want += out * (weights * (slots == slot)).sum(1, keepdim=True)
    entries = {} if tactics is None else {experts_key("fp8_experts", tokens, per_token, parts[0].shape): tactics}
    layer = Fp8Experts(packed, TacticTable(entries, "test"))
    zeros, ones = torch.zeros_like(x), torch.ones(d, dtype=BF16, device=CUDA)
    y, _, _ = finalize_rms_norm(zeros, layer(quantize_rows(x), slots, weights, base), ones, 1e-6, quantize=False)
    assert error(y, want) < 1e-2  # 0.0084 was seen, of 256 numbers
    again = layer(quantize_rows(x), slots, weights, base)
    assert torch.equal(y, finalize_rms_norm(zeros, again, ones, 1e-6, quantize=False)[0])
    assert (fp8_expert_tactics(tokens * per_token, experts) is None) == (tokens == 900), "one of them is DeepGEMM's"


# Every token has all experts: the rounding of activations must not decide which.
FP8 = LITE | {
    "num_hidden_layers": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 8,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}


def bound(folder: Path, environment: Environment, backend: str) -> DeepseekForCausalLM:
    """The matrices in fp8; a pool of its own."""
    fast = Environment.probe(CUDA, strict=True)
    model = cast(DeepseekForCausalLM, load(folder, load_format="dummy", device=CUDA, environment=fast).model)
    groups = model.kv_groups(BLOCK)
    pool = KvPool.allocate(KvGeometry(groups, model.spec.rope_convention), RankLayout(0, 0, 1), [NUM_BLOCKS], CUDA)
    caches = [kv_cache(group, regions) for group, regions in zip(groups, pool.regions, strict=True)]
    assert model.bind_kv(caches, environment).chosen == backend
    return model


@torch.inference_mode()
def test_a_model_keeps_its_matrices_and_computes_as_they_say(tmp_path: Path) -> None:
    """Against layers in torch that widen the same matrices. What differs is the rounding of activations: 0.25 to 0.41
    of these logits, says the same model in torch with rows rounded as `block_fp8.product` rounds them; matrices or
    scales in a wrong place make it 1.4."""
    (tmp_path / "config.json").write_text(json.dumps(FP8 | {"torch_dtype": "bfloat16"}))
    kept = bound(tmp_path, Environment.probe(CUDA, strict=True), "hopper")
    plain = bound(tmp_path, Environment.probe(CUDA, disabled=["hopper"]), "reference")
    for model in (kept, plain):
        stored = [weight.dtype for weight in model.state_dict().values()]
        assert stored.count(torch.float8_e4m3fn) == 2 * 3 + 3 + 3 + 8 * 3 + (2 if model is plain else 0)
    tokens = torch.randint(0, 1000, (4, 600), device=CUDA)
    for rows in STEPS:
        batch = batch_of(rows)
        ids = torch.cat([tokens[number, cached : cached + new] for number, cached, new in rows])
        ours, wanted = (model.logits(model.forward(ids, batch)) for model in (kept, plain))
        assert 0.05 < agreement(ours, wanted) < 0.6, rows

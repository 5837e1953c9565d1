"""Every Triton kernel against its torch reference on fresh random inputs, at odd sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.tensor_errors import error
from workers.attention.merging import PartialAttention, merge
from workers.kernels.tactics import (
    SINGLE_ENTRIES,
    ExpertTactic,
    ExpertTactics,
    SkinnyTactic,
    expert_tactics,
    skinny_tactic,
)
from workers.layers.norm import RmsNorm
from workers.layers.rotary import RotaryEmbedding
from workers.moe.routing import RoutingRule
from workers.moe.routing import route as reference_route

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BF16 = torch.bfloat16
BLOCK = 64


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=CUDA).to(BF16)


def norm_of(size: int) -> RmsNorm:
    norm = RmsNorm(size, 1e-6).to(CUDA)
    norm.weight.data = random(size)
    return norm


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 1536), (17, 2048), (130, 4096), (5, 7168)])
def test_norms(rows: int, size: int) -> None:
    from workers.kernels.norms import add_rms_norm, rms_norm

    norm, x, delta = norm_of(size), random(rows, size), random(rows, size)
    assert error(rms_norm(x, norm.weight, norm.eps), norm(x)) < 3e-3
    total, normed = add_rms_norm(x, delta, norm.weight, norm.eps)
    assert torch.equal(total, x + delta)
    assert error(normed, norm(x + delta)) < 3e-3
    wide = random(rows, size + 64)[:, :size]
    assert error(rms_norm(wide, norm.weight, norm.eps), norm(wide)) < 3e-3


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (7, 1408), (129, 10944)])
def test_silu_mul(rows: int, size: int) -> None:
    from workers.kernels.activation import silu_mul

    both = random(rows, 2 * size)
    assert error(silu_mul(both), F.silu(both[:, :size]) * both[:, size:]) < 1e-3


@pytest.mark.parametrize(("rows", "size", "d"), [(1, 16, 64), (17, 1408, 4096), (33, 12288, 1000), (600, 9000, 4096)])
def test_silu_mul_of_rows_whose_norm_is_pending(rows: int, size: int, d: int) -> None:
    from workers.kernels.activation import silu_mul
    from workers.kernels.norms import PendingNorm

    norm, x, weight = RmsNorm(d, 1e-3).to(CUDA), 30 * random(rows, d), 0.02 * random(2 * size, d)
    norm.weight.data = torch.ones(d, device=CUDA)
    gate, up = F.linear(norm(x.float()), weight.float()).split(size, -1)
    assert error(silu_mul(F.linear(x, weight), PendingNorm(x, norm.eps)), F.silu(gate) * up) < 6e-3
    x.zero_()
    assert not silu_mul(F.linear(x, weight), PendingNorm(x, norm.eps)).any()


@pytest.mark.parametrize(("tokens", "pending"), [(37, False), (1, True), (37, True), (520, True)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotated_heads_and_their_pages(normed: bool, tokens: int, pending: bool) -> None:
    """And the same of rows whose norm is pending."""
    from workers.kernels.norms import PendingNorm
    from workers.kernels.rotary import RotationTable, rotate_heads

    heads, kv, dim, layers, layer = 12, 3, 128, 4, 2
    rotary = RotaryEmbedding(dim, 1e6)
    table = rotary.rotation(torch.arange(5000, device=CUDA), torch.float32)
    positions = torch.randint(0, 5000, (tokens,), device=CUDA)
    slots = torch.randperm(9 * BLOCK, device=CUDA)[:tokens] + BLOCK
    pages = torch.full((10, layers, 2, kv, BLOCK, dim), 7.0, dtype=BF16, device=CUDA)
    qkv = random(tokens, (heads + 2 * kv) * dim)
    q_norm, k_norm = norm_of(dim), norm_of(dim)
    rows = PendingNorm(5 * random(tokens, 768), 1e-6) if pending else None
    scaled = qkv.clone() if rows is None else qkv * rows.rows.float().square().mean(-1, keepdim=True).rsqrt()
    q, k, v = scaled.view(tokens, -1, dim).split([heads, kv, kv], 1)
    if normed:
        q, k = q_norm(q), k_norm(k)
    rotation = rotary.rotation(positions, torch.float32)
    q, k = rotation.apply(q.float()), rotation.apply(k.float())
    norms = (q_norm.weight, k_norm.weight, 1e-6) if normed else None
    rotate_heads(
        qkv,
        RotationTable(table.cos.flatten(1), table.sin.flatten(1)),
        positions,
        norms,
        pages,
        slots,
        layer,
        heads,
        rows,
    )
    out = qkv.view(tokens, -1, dim)
    assert error(out[:, :heads], q) < 4e-3
    assert error(out[:, heads : heads + kv], k) < 4e-3
    assert error(out[:, heads + kv :], v) < 4e-3
    blocks, offsets = slots // BLOCK, slots % BLOCK
    assert torch.equal(pages[blocks, layer, 0, :, offsets], out[:, heads : heads + kv])
    assert torch.equal(pages[blocks, layer, 1, :, offsets], out[:, heads + kv :])
    assert pending or torch.equal(out[:, heads + kv :], v)
    assert (pages[:, [0, 1, 3]] == 7).all()
    assert (pages[:, layer] == 7).sum() >= (10 * BLOCK - tokens) * 2 * kv * dim


RULES = [
    RoutingRule(num_experts=64, experts_per_token=6, normalize=False, scale=1.0),
    RoutingRule(num_experts=128, experts_per_token=8, normalize=True),
    RoutingRule(num_experts=160, experts_per_token=6, normalize=False, scale=16.0, num_groups=8, max_groups=3),
    RoutingRule(
        num_experts=256,
        experts_per_token=8,
        normalize=True,
        scale=2.5,
        scoring="sigmoid",
        balanced=True,
        num_groups=8,
        max_groups=4,
        best_of_group=2,
    ),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.num_experts}")
@pytest.mark.parametrize("tokens", [1, 131])
def test_routing(rule: RoutingRule, tokens: int) -> None:
    from workers.kernels.expert_routing import RouteSpec, route

    logits = torch.randn(tokens, rule.num_experts, device=CUDA)
    bias = torch.randn(rule.num_experts, device=CUDA) * 0.1 if rule.balanced else None
    want = reference_route(logits, bias, rule)
    spec = RouteSpec(
        rule.num_experts,
        rule.experts_per_token,
        2,
        rule.scale,
        rule.scoring == "sigmoid",
        rule.balanced,
        rule.normalize,
        rule.num_groups,
        rule.max_groups,
        rule.best_of_group,
    )
    experts, weights = route(logits, bias, spec)
    chosen, empty = rule.experts_per_token, torch.zeros(tokens, rule.num_experts, device=CUDA)
    ours = empty.scatter(1, experts[:, :chosen].long(), weights[:, :chosen])
    assert error(ours, empty.scatter(1, want.experts, want.weights)) < 1e-5
    assert experts[:, chosen:].tolist() == [[rule.num_experts, rule.num_experts + 1]] * tokens
    assert (weights[:, chosen:] == 1).all()


@pytest.mark.parametrize(("entries", "slots", "tile"), [(1, 66, 16), (65, 5, 16), (3001, 66, 64), (65536, 66, 128)])
def test_rows_are_planned_as_a_stable_sort(entries: int, slots: int, tile: int) -> None:
    from workers.kernels.expert_routing import plan_rows

    chosen = torch.randint(0, slots, (entries, 1), dtype=torch.int32, device=CUDA)
    plan = plan_rows(chosen, slots, tile)
    order = chosen.flatten().long().argsort(stable=True)
    assert torch.equal(plan.order.long(), order)
    seen: list[tuple[int, int]] = []
    for slot, start, end in zip(*(part.tolist() for part in plan[1:4]), strict=True):
        if slot >= 0:
            seen += [(row, slot) for row in range(start, min(start + tile, end))]
    assert sorted(seen) == list(enumerate(chosen.flatten()[order].tolist()))


SWEPT = [
    ExpertTactic(16, 64, 64, 4, 3),
    ExpertTactic(16, 64, 128, 4, 4, swap=True),
    ExpertTactic(32, 128, 64, 4, 3, swap=True, tma=True),
    ExpertTactic(64, 64, 64, 4, 3, tma=True),
    ExpertTactic(128, 128, 64, 8, 3, tma=True),  # the last tile of a slot may be half as high
    ExpertTactic(128, 64, 64, 8, 3),
]


@pytest.mark.parametrize("tactic", [None, *SWEPT])
@pytest.mark.parametrize(
    ("tokens", "experts", "per_token", "d", "inner"),
    [(1, 9, 3, 256, 136), (77, 9, 4, 320, 200), (600, 12, 8, 512, 384), (340, 7, 2, 256, 128)],
)
def test_experts(tokens: int, experts: int, per_token: int, d: int, inner: int, tactic: ExpertTactic | None) -> None:
    from workers.kernels.expert_routing import plan_rows
    from workers.kernels.grouped_gemm import down, gate_up, single_rows
    from workers.kernels.norms import ExpertOutputs, add_rms_norm, finalize_rms_norm

    x, both, downs = random(tokens, d), random(experts, 2 * inner, d) * 0.1, random(experts, d, inner) * 0.1
    slots = torch.stack([torch.randperm(experts, device=CUDA)[:per_token] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, per_token, device=CUDA)
    want = torch.zeros(tokens, d, device=CUDA)
    for slot in range(experts):
        gates = x.float() @ both[slot].float().t()
        out = (F.silu(gates[:, :inner]) * gates[:, inner:]) @ downs[slot].float().t()
        want += out * (weights * (slots == slot)).sum(1, keepdim=True)
    tactics = ExpertTactics(tactic, tactic) if tactic else expert_tactics(slots.numel(), experts)
    first, second = tactics.first, tactics.second
    plan = plan_rows(slots, experts, first.rows)
    if not tactics.sort:
        plan = single_rows(slots, torch.arange(SINGLE_ENTRIES, dtype=torch.int32, device=CUDA))
    outs = down(gate_up(x, both, plan, first, per_token), downs, plan, second)
    norm, stream, zeros = norm_of(d), random(tokens, d), torch.zeros(tokens, d, dtype=BF16, device=CUDA)
    base, places = random(tokens, d), torch.randperm(len(outs), device=CUDA)
    spread = torch.empty_like(outs).index_copy_(0, places, outs)
    for delta, expected in (
        (ExpertOutputs(outs, weights, None, None), want),
        (ExpertOutputs(spread, weights, base, places.int()), want + base.float()),
    ):
        summed, _, _ = finalize_rms_norm(zeros, delta, norm.weight, norm.eps, quantize=False)
        assert error(summed, expected) < 8e-3
        total, normed, quantized = finalize_rms_norm(stream, delta, norm.weight, norm.eps, quantize=d % 128 == 0)
        apart = add_rms_norm(stream, summed, norm.weight, norm.eps)
        assert torch.equal(total, apart[0]) and error(normed, apart[1]) < 1e-3
        assert (quantized is None) == (d % 128 != 0)
    again = down(gate_up(x, both, plan, first, per_token), downs, plan, second)
    assert torch.equal(outs, again)


@pytest.mark.parametrize("tactic", [None, SkinnyTactic(16, 512, 0, 4, 2), SkinnyTactic(64, 128, 512, 8, 3)])
@pytest.mark.parametrize(
    ("rows", "d", "outputs"), [(1, 2048, 3648), (3, 320, 100), (16, 4096, 24576), (7, 12288, 4096), (131, 2048, 64)]
)
def test_products_of_few_rows(rows: int, d: int, outputs: int, tactic: SkinnyTactic | None) -> None:
    from workers.kernels.skinny_gemm import skinny_gate_up, skinny_linear

    x, weight = random(rows, d), random(outputs, d)
    want = x.float() @ weight.float().t()
    assert error(skinny_linear(x, weight, tactic or skinny_tactic(outputs, gated=False)), want) < 4e-3
    half = outputs // 2
    want = F.silu(want[:, :half].to(BF16)).float() * want[:, half:]
    assert error(skinny_gate_up(x, weight, tactic or skinny_tactic(outputs, gated=True)), want) < 8e-3


def test_joined_keys() -> None:
    from workers.kernels.rotary import join_keys

    both, rope = random(33, 5, 256), random(33, 600)[:, 536:]
    want = torch.cat((both[..., :128], rope.unsqueeze(1).expand(-1, 5, -1)), -1)
    assert torch.equal(join_keys(both, rope, 128), want)


@pytest.mark.parametrize(("queries", "seen", "heads", "size"), [(1, 1, 16, 128), (70, 33, 5, 128), (9, 9, 20, 64)])
def test_parts_of_some_rows_are_merged_in_place(queries: int, seen: int, heads: int, size: int) -> None:
    from workers.kernels.split_merge import merge_rows

    rows = torch.randperm(queries, device=CUDA)[:seen]
    out, part = torch.randn(queries, heads, size, device=CUDA), random(seen, heads, size)
    lse, part_lse = 20 * torch.randn(queries, heads, device=CUDA), 20 * torch.randn(seen, heads, device=CUDA)
    base = torch.log(torch.tensor(2.0, device=CUDA))
    before = PartialAttention(out[rows], lse[rows] * base)
    after = merge(before, PartialAttention(part.float(), part_lse * base))
    want_out, want_lse = out.index_copy(0, rows, after.out), lse.index_copy(0, rows, after.lse / base)
    merge_rows(out, lse, rows, part, part_lse)
    assert error(out, want_out) < 1e-5 and error(lse, want_lse) < 1e-6

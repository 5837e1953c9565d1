"""The sparse indexer's kernels against their references at odd sizes, and on pools of more than 2^32 elements."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.tensor_errors import error
from workers.attention.index_keys import gather_pages, quantize_rows, write_pages
from workers.attention.index_tools import (
    PAGE,
    DeepGemmScores,
    QuantizedQueries,
    TorchScores,
    choose_flashinfer,
    choose_torch,
)
from workers.attention.mla_interface import MlaProblem
from workers.attention.sparse import attend_chosen
from workers.engine.cuda_graph import default_sizes
from workers.kernels.tactics import SHORT_ROWS, DecodeTactic, sparse_tactic
from workers.layers.norm import LayerNorm
from workers.layers.rotary import RotaryEmbedding

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BF16 = torch.bfloat16
SIZE, ROPE, LATENT = 128, 64, 512
PAGE_BYTES = PAGE * (SIZE + 4)
DRAWS = 16  # a score, summed over heads, may be close to 0: one of them alone says little
ROTARY = RotaryEmbedding(ROPE, 1e4)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=CUDA).to(BF16)


def rotation_table():
    from workers.kernels.rotary import RotationTable

    table = ROTARY.rotation(torch.arange(5000, device=CUDA), torch.float32)
    return RotationTable(table.cos.flatten(1).contiguous(), table.sin.flatten(1).contiguous())


def key_pages(num_blocks: int, num_layers: int) -> Tensor:
    """Random keys on every row."""
    values, scales = quantize_rows(torch.randn(num_blocks * num_layers, PAGE, SIZE, device=CUDA))
    parts = values.view(torch.uint8).flatten(1), scales.view(torch.uint8).flatten(1)
    return torch.cat(parts, 1).view(num_blocks, num_layers, PAGE_BYTES)


@pytest.mark.parametrize("tokens", [1, 37, 300])
def test_index_keys_are_those_of_the_layer(tokens: int) -> None:
    """fp8 rounds a value in two ways where the last bit before it differs: few values, by one step."""
    from workers.kernels.index_rows import write_index_keys

    layers, layer = 3, 1
    norm = LayerNorm(SIZE, 1e-6).to(CUDA)
    norm.weight.data, norm.bias.data = random(SIZE), random(SIZE)
    keys = random(tokens, SIZE + 70)[:, :SIZE]
    positions = torch.randint(0, 5000, (tokens,), device=CUDA)
    slots = torch.randperm(9 * PAGE, device=CUDA)[:tokens] + PAGE
    pages = torch.full((10, layers, PAGE_BYTES), 7, dtype=torch.uint8, device=CUDA)
    want = pages.clone()
    normed = norm(keys).float()
    turned = ROTARY.rotation(positions, torch.float32).apply(normed[:, None, :ROPE]).squeeze(1)
    write_pages(want, layer, slots, torch.cat((turned, normed[:, ROPE:]), 1))
    write_index_keys(keys, rotation_table(), positions, norm.weight, norm.bias, norm.eps, pages, PAGE, slots, layer)
    assert torch.equal(pages[:, [0, 2]], want[:, [0, 2]])
    rows = torch.arange(10, device=CUDA) * layers + layer
    (ours, our_scales), (theirs, scales) = gather_pages(pages, rows, SIZE), gather_pages(want, rows, SIZE)
    others = torch.ones(10 * PAGE, dtype=torch.bool, device=CUDA)
    others[slots] = False
    assert torch.equal(ours.view(torch.uint8)[others], theirs.view(torch.uint8)[others])
    torch.testing.assert_close(our_scales[slots], scales[slots], rtol=1e-2, atol=0)
    dequantized = ours[slots].float() * our_scales[slots, None]
    assert error(dequantized, theirs[slots].float() * scales[slots, None]) < 1e-2
    assert error(dequantized, torch.cat((turned, normed[:, ROPE:]), 1)) < 4e-2


@pytest.mark.parametrize(("rows", "heads"), [(1, 64), (13, 32), (70, 64), (5, 3)])
def test_index_queries(rows: int, heads: int) -> None:
    from workers.kernels.index_rows import quantize_queries

    both = random(rows, heads * SIZE + 40 + heads)
    queries = both[:, : heads * SIZE].unflatten(1, (heads, SIZE))
    weights = both[:, heads * SIZE + 40 :]
    positions = torch.randint(0, 5000, (rows,), device=CUDA)
    rotation = ROTARY.rotation(positions, torch.float32)
    wide = torch.cat((rotation.apply(queries[..., :ROPE].float()), queries[..., ROPE:].float()), -1)
    values, scales = quantize_rows(wide)
    ours, our_weights = quantize_queries(queries, weights, rotation_table(), positions, 0.25)
    assert error(our_weights, weights.float() * scales * 0.25) < 1e-5
    assert error(ours.float() * scales[..., None], values.float() * scales[..., None]) < 1e-2
    assert error(ours.float() * scales[..., None], wide) < 4e-2


def queries_of(rows: int, heads: int) -> QuantizedQueries:
    values, scales = quantize_rows(torch.randn(rows, heads, SIZE, device=CUDA))
    return QuantizedQueries(values, torch.randn(rows, heads, device=CUDA) * scales)


def visible(scores: Tensor, lengths: Tensor) -> Tensor:
    hidden = torch.arange(scores.shape[1], device=CUDA) >= lengths[:, None]
    return scores.masked_fill(hidden, 0)


@pytest.mark.parametrize(("lengths", "heads"), [([1], 64), ([700, 1, 64, 65, 257], 64), ([129] * 67, 32)])
def test_scores_of_pages(lengths: list[int], heads: int) -> None:
    num_layers, layer, width = 3, 2, -(-max(lengths) // PAGE) + 1
    seen = torch.tensor(lengths, dtype=torch.int32, device=CUDA)
    fast, plain = DeepGemmScores(), TorchScores()
    scores: list[tuple[Tensor, Tensor]] = []
    for _ in range(DRAWS):
        pages = key_pages(width * len(lengths) + 1, num_layers)
        table = torch.randperm(width * len(lengths), device=CUDA, dtype=torch.int32).view(len(lengths), width) + 1
        queries = queries_of(len(lengths), heads)
        ours = fast.paged(queries, pages, layer, table, seen, fast.schedule(seen))
        theirs = plain.paged(queries, pages, layer, table, seen, None)
        assert ours.shape[1] >= max(lengths)
        scores.append((visible(ours[:, : width * PAGE], seen), visible(theirs, seen)))
    assert error(*map(torch.cat, zip(*scores, strict=True))) < 1e-3


@pytest.mark.parametrize(("rows", "context", "heads"), [(1, 1, 64), (77, 333, 64), (130, 1000, 32)])
def test_scores_of_packed_keys(rows: int, context: int, heads: int) -> None:
    scores: list[tuple[Tensor, Tensor]] = []
    for _ in range(DRAWS):
        keys, scales = quantize_rows(torch.randn(context, SIZE, device=CUDA))
        lengths = torch.randint(1, context + 1, (rows,), dtype=torch.int32, device=CUDA)
        lengths[-1] = context
        queries = queries_of(rows, heads)
        ours = DeepGemmScores().packed(queries, keys, scales, lengths)
        theirs = TorchScores().packed(queries, keys, scales, lengths)
        scores.append((visible(ours[:, :context], lengths), visible(theirs, lengths)))
    assert error(*map(torch.cat, zip(*scores, strict=True))) < 1e-3


@pytest.mark.parametrize(
    ("lengths", "topk"), [([1], 2048), ([5000, 2048, 2049, 3, 4096], 2048), ([640] * 70, 100), ([33, 7], 128)]
)
def test_choices(lengths: list[int], topk: int) -> None:
    """Ties too, and garbage behind the lengths; twice the same, in the same order."""
    width = -(-max(lengths) // PAGE) + 2
    scores = torch.randn(len(lengths), width * PAGE, device=CUDA)
    scores = (scores * 4).round() / 4
    seen = torch.tensor(lengths, dtype=torch.int32, device=CUDA)
    scores.masked_fill_(torch.arange(width * PAGE, device=CUDA) >= seen[:, None], float("nan"))
    table = torch.randint(0, 1000, (len(lengths), width), device=CUDA, dtype=torch.int32) * 1000
    table += torch.arange(width, device=CUDA, dtype=torch.int32)
    ours = choose_flashinfer(scores.clone(), seen, table, topk)
    assert torch.equal(ours, choose_flashinfer(scores.clone(), seen, table, topk))
    theirs = choose_torch(scores.clone(), seen, table, topk)
    assert ours.shape == theirs.shape == (len(lengths), topk)
    for row, length in enumerate(lengths):
        count = min(length, topk)
        slots = (table[row, :, None] * PAGE + torch.arange(PAGE, device=CUDA)).flatten()
        score_of = dict(zip(slots.tolist(), scores[row].tolist(), strict=True))
        best = scores[row, :length].sort(descending=True).values[:count].tolist()
        for mine in (ours[row].tolist(), theirs[row].tolist()):
            assert len(set(mine[:count])) == count and set(mine[count:]) <= {-1}
            assert sorted((score_of[slot] for slot in mine[:count]), reverse=True) == best
    shared = choose_flashinfer(scores.clone(), seen, table[:1], topk)
    other = choose_torch(scores.clone(), seen, table[:1], topk)
    assert shared.shape == other.shape and ((shared >= 0).sum(1) == (other >= 0).sum(1)).all()


TACTICS = [DecodeTactic(1, 32, 8, 3), DecodeTactic(8, 32, 8, 2), DecodeTactic(4, 64, 8, 2)]


@pytest.mark.parametrize("tactic", [None, *TACTICS])
@pytest.mark.parametrize(("queries", "heads", "chosen"), [(1, 128, 2048), (7, 128, 300), (130, 16, 100), (3, 5, 64)])
def test_attention_to_chosen_rows(queries: int, heads: int, chosen: int, tactic: DecodeTactic | None) -> None:
    from workers.kernels.sparse_latents import sparse_latents

    blocks, layers, layer = 40, 2, 1
    pages = random(blocks, layers, PAGE, LATENT + ROPE)
    rows = torch.arange(blocks * PAGE, device=CUDA)
    rows = rows // PAGE * (layers * PAGE) + rows % PAGE  # of layer 0
    picks = torch.stack([rows[torch.randperm(len(rows), device=CUDA)[:chosen]] for _ in range(queries)])
    lengths = torch.randint(1, 2 * chosen, (queries,), device=CUDA, dtype=torch.int32)
    lengths[0] = 1
    picks[torch.arange(chosen, device=CUDA) >= lengths[:, None]] = -1
    both = random(queries, heads, LATENT + ROPE)
    ours = sparse_latents(
        both[..., :LATENT],
        both[..., LATENT:],
        pages,
        picks.to(torch.int32),
        lengths,
        layer,
        0.05,
        tactic or sparse_tactic(queries, heads),
    )
    flat = pages.float().view(-1, LATENT + ROPE)
    there = torch.where(picks < 0, picks, picks + layer * PAGE)
    want = attend_chosen(both.float(), flat, there, latent_size=LATENT, scale=0.05)
    assert error(ours, want) < 6e-3


@pytest.mark.parametrize(("queries", "heads", "chosen"), [(8, 128, 2048), (72, 16, 100), (16, 64, 33)])
def test_whole_choices_by_fa3_and_short_ones_by_our_own(queries: int, heads: int, chosen: int) -> None:
    from workers.attention.flashinfer_mla import ChosenRows
    from workers.attention.flashinfer_prefill import workspace
    from workers.kernels.sparse_latents import sparse_latents

    problem = MlaProblem(
        num_heads=heads, latent_size=LATENT, rope_size=ROPE, block_size=PAGE, dtype=BF16, scale=0.05, index_topk=chosen
    )
    plan = ChosenRows(problem, queries, chosen, workspace(CUDA))
    pages = random(40, 1, PAGE, LATENT + ROPE)
    flat = pages.view(-1, LATENT + ROPE)
    for _ in range(2):
        picks = torch.stack([torch.randperm(len(flat), device=CUDA)[:chosen] for _ in range(queries)])
        lengths = torch.full((queries,), chosen, device=CUDA, dtype=torch.int32)
        lengths[::3] = torch.randint(1, chosen + 1, (len(lengths[::3]),), device=CUDA, dtype=torch.int32)
        lengths[1] = chosen + 1000
        picks[torch.arange(chosen, device=CUDA) >= lengths[:, None]] = -1
        both, out = random(queries, heads, LATENT + ROPE), random(queries, heads, LATENT)
        q, rope, rows = both[..., :LATENT], both[..., LATENT:], picks.to(torch.int32)
        plan.attend(q, rope, flat, rows, out)
        whole = out[lengths >= chosen].clone()
        sparse_latents(q, rope, pages, rows, lengths, 0, 0.05, SHORT_ROWS, out, only_short=True)
        assert torch.equal(out[lengths >= chosen], whole)
        assert error(out, attend_chosen(both.float(), flat.float(), picks, latent_size=LATENT, scale=0.05)) < 6e-3


def test_decode_graphs_are_attended_by_one_plan() -> None:
    from workers.attention.hopper_dsa import PLANNED, planned_queries

    assert [planned_queries(count) for count in (7, 8, 63, 64, 250, 2000)] == [0, 8, 56, 64, 240, 1024]
    assert {size for size in default_sizes(256, least_step=8) if size >= 8} <= set(PLANNED) and len(PLANNED) < 30


def test_blocks_at_the_end_of_a_pool_of_more_than_2_to_the_32_elements() -> None:
    from workers.attention.flashinfer_mla import ChosenRows
    from workers.attention.flashinfer_prefill import workspace
    from workers.kernels.index_rows import write_index_keys
    from workers.kernels.sparse_latents import sparse_latents

    problem = MlaProblem(
        num_heads=128, latent_size=LATENT, rope_size=ROPE, block_size=PAGE, dtype=BF16, scale=0.05, index_topk=200
    )
    layers, layer = 61, 60
    blocks = 2**32 // (layers * PAGE * (LATENT + ROPE)) + 8
    pages = torch.empty(blocks, layers, PAGE, LATENT + ROPE, dtype=BF16, device=CUDA)
    assert pages.numel() > 2**32
    last = pages[-4:]
    last.copy_(random(*last.shape))
    picks = torch.randperm(4 * PAGE, device=CUDA)[:200]
    slots = ((blocks - 4 + picks // PAGE) * (layers * PAGE) + picks % PAGE).to(torch.int32)[None]
    both = random(1, 128, LATENT + ROPE)
    lengths = torch.tensor([200], dtype=torch.int32, device=CUDA)
    ours = sparse_latents(
        both[..., :LATENT], both[..., LATENT:], pages, slots, lengths, layer, 0.05, sparse_tactic(1, 128)
    )
    mine = last[:, layer].reshape(-1, LATENT + ROPE).float()
    want = attend_chosen(both.float(), mine, picks[None], latent_size=LATENT, scale=0.05)
    assert error(ours, want) < 6e-3
    plan = ChosenRows(problem, 8, 200, workspace(CUDA))
    eight = torch.cat([both, random(7, 128, LATENT + ROPE)])
    there = pages.view(-1, LATENT + ROPE)[layer * PAGE :]
    plan.attend(eight[..., :LATENT], eight[..., LATENT:], there, slots.expand(8, -1), ours := random(8, 128, LATENT))
    assert error(ours[:1], want) < 6e-3
    del pages, last, there
    blocks = 2**32 // (layers * PAGE_BYTES) + 8
    pages = torch.empty(blocks, layers, PAGE_BYTES, dtype=torch.uint8, device=CUDA)
    assert pages.numel() > 2**32
    norm = LayerNorm(SIZE, 1e-6).to(CUDA)
    norm.weight.data, norm.bias.data = random(SIZE), random(SIZE)
    positions = torch.arange(4 * PAGE, device=CUDA)
    slots = torch.arange((blocks - 4) * PAGE, blocks * PAGE, device=CUDA)
    keys = random(4 * PAGE, SIZE)
    write_index_keys(keys, rotation_table(), positions, norm.weight, norm.bias, norm.eps, pages, PAGE, slots, layer)
    table = torch.arange(blocks - 4, blocks, device=CUDA, dtype=torch.int32)[None]
    lengths = torch.tensor([4 * PAGE - 3], dtype=torch.int32, device=CUDA)
    queries, fast = queries_of(1, 64), DeepGemmScores()
    scores = fast.paged(queries, pages, layer, table, lengths, fast.schedule(lengths))
    assert (
        error(
            scores[:, : lengths[0]], TorchScores().paged(queries, pages, layer, table, lengths, None)[:, : lengths[0]]
        )
        < 1e-3
    )
    normed = norm(keys).float()
    turned = ROTARY.rotation(positions, torch.float32).apply(normed[:, None, :ROPE]).squeeze(1)
    values, scales = quantize_rows(torch.cat((turned, normed[:, ROPE:]), 1))
    want = TorchScores().packed(queries, values, scales, lengths)
    assert error(scores[:, : lengths[0]], want[:, : lengths[0]]) < 2e-2

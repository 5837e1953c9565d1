"""Attention of one token per sequence beside its references: ends of blocks and of runs, many contexts, NaN behind the
tokens, a pool of more than 2^32 elements."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.tensor_errors import error
from workers.kernels.tactics import (
    LATENT_LAUNCHES,
    LATENT_PROGRAMS,
    RUNS,
    DecodeTactic,
    RunsTactic,
    decode_tactic,
    latent_tactic,
)

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BF16 = torch.bfloat16
BLOCK = 64


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=CUDA).to(BF16)


def tables(contexts: list[int], num_blocks: int) -> Tensor:
    """Blocks drawn without repetition, from the end of the pool too; behind each row lies the null block."""
    free = torch.randperm(num_blocks - 1, device=CUDA) + 1
    width = -(-max(contexts) // BLOCK)
    table = torch.zeros(len(contexts), width, dtype=torch.int64, device=CUDA)
    at = 0
    for row, context in enumerate(contexts):
        count = -(-context // BLOCK)
        table[row, :count] = free[at : at + count]
        at += count
    return table


CONTEXTS = [1, 64, 65, 2, 700, 4097]


@pytest.mark.parametrize(
    "tactic",
    [
        None,
        DecodeTactic(1, 32, 4, 2),
        DecodeTactic(16, 64, 8, 3),
        *(replace(RUNS, programs=programs) for programs in (2, 60, RUNS.programs)),
    ],
)
@pytest.mark.parametrize(("heads", "kv"), [(32, 8), (7, 7), (24, 2), (64, 2)])
def test_paged_decode(heads: int, kv: int, tactic: DecodeTactic | RunsTactic | None) -> None:
    from workers.kernels.context_runs import cut_contexts
    from workers.kernels.paged_decode import paged_decode

    layers, layer, dim, scale = 3, 2, 128, 0.11
    pages = torch.randn(100, layers, 2, kv, BLOCK, dim, device=CUDA).to(BF16)
    table, contexts = tables(CONTEXTS, 100), torch.tensor(CONTEXTS, device=CUDA)
    for row, context in enumerate(CONTEXTS):
        if context % BLOCK:  # what an earlier owner left behind
            pages[table[row, context // BLOCK], :, :, :, context % BLOCK :] = float("nan")
    q = random(len(CONTEXTS), (heads + 5) * dim)[:, : heads * dim].unflatten(1, (heads, dim))
    how = tactic or decode_tactic(len(CONTEXTS) * kv)
    if isinstance(how, RunsTactic):
        how = cut_contexts(contexts - 1, kv, how)
    out = paged_decode(q, pages, table, contexts - 1, layer, scale, how)
    for row, context in enumerate(CONTEXTS):
        keys, values = pages[table[row], layer].transpose(0, 1).transpose(1, 2).flatten(2, 3)[:, :, :context].float()
        q_row = q[row].float().view(kv, -1, dim)
        want = ((q_row @ keys.transpose(1, 2)) * scale).softmax(-1) @ values
        assert error(out[row], want.flatten()) < 5e-3


@pytest.mark.parametrize(
    ("heads", "tactic"),
    [
        *((heads, None) for heads in (5, 16, 128)),
        *((9, RunsTactic(programs, 32, 4, 3)) for programs in (1, 2, 7, 1000)),
        *((16, RunsTactic(LATENT_PROGRAMS[0], *launch)) for launch in LATENT_LAUNCHES),
    ],
)
def test_latent_decode(heads: int, tactic: RunsTactic | None) -> None:
    from workers.kernels.context_runs import cut_contexts
    from workers.kernels.latent_decode import latent_decode, programs_of

    layers, layer, scale = 2, 1, 0.07
    pages = torch.randn(100, layers, BLOCK, 576, device=CUDA).to(BF16)
    table, contexts = tables(CONTEXTS, 100), torch.tensor(CONTEXTS, device=CUDA)
    for row, context in enumerate(CONTEXTS):
        if context % BLOCK:
            pages[table[row, context // BLOCK], :, context % BLOCK :] = float("nan")
    q = random(heads, len(CONTEXTS), 512).transpose(0, 1)
    rope = random(len(CONTEXTS), heads, 192)[..., 128:]
    cut = cut_contexts(contexts - 1, programs_of(heads), tactic or latent_tactic(len(CONTEXTS), heads))
    out = latent_decode(q, rope, pages, table, layer, scale, cut)
    for row, context in enumerate(CONTEXTS):
        rows = pages[table[row], layer].flatten(0, 1)[:context].float()
        scores = torch.cat((q[row], rope[row]), -1).float() @ rows.t() * scale
        assert error(out[row], scores.softmax(-1) @ rows[:, :512]) < 5e-3


@pytest.mark.parametrize("programs", [5, 132, 264])
@pytest.mark.parametrize("count", [1, 64, 131])
@pytest.mark.parametrize("launch", [(32, 4, 3), (64, 4, 3, 4)])
def test_latent_decode_of_many_contexts(count: int, programs: int, launch: tuple[int, ...]) -> None:
    """Runs that end within a context, at its end, behind many short ones, and one long context of many runs."""
    from workers.kernels.context_runs import cut_contexts
    from workers.kernels.latent_decode import latent_decode, programs_of

    num_blocks, scale = 260, 0.07
    pages = torch.randn(num_blocks, 1, BLOCK, 576, device=CUDA).to(BF16)
    lengths = [4000, *(1 + index * 37 % 300 for index in range(count - 1))]
    table = torch.randint(0, num_blocks, (count, 64), device=CUDA)
    positions = torch.tensor(lengths, device=CUDA) - 1
    q, rope = random(count, 16, 512), random(count, 16, 64)
    cut = cut_contexts(positions, programs_of(16), RunsTactic(programs, *launch))
    out = latent_decode(q, rope, pages, table, 0, scale, cut)
    for row, length in enumerate(lengths):
        rows = pages[table[row], 0].flatten(0, 1)[:length].float()
        scores = torch.cat((q[row], rope[row]), -1).float() @ rows.t() * scale
        assert error(out[row], scores.softmax(-1) @ rows[:, :512]) < 5e-3, (row, length)


@pytest.mark.parametrize("programs", [7, 66, 462, 900])
@pytest.mark.parametrize(("count", "heads", "kv"), [(1, 8, 2), (65, 9, 3), (131, 14, 7)])
def test_paged_decode_of_many_contexts(count: int, heads: int, kv: int, programs: int) -> None:
    """The same, and heads that are no multiple of those that one program merges, where another kernel does (900).
    Layers share a cut: what they count in it is as before behind each."""
    from workers.kernels.context_runs import cut_contexts
    from workers.kernels.paged_decode import paged_decode

    num_blocks, scale = 200, 0.09
    pages = torch.randn(num_blocks, 1, 2, kv, BLOCK, 128, device=CUDA).to(BF16)
    lengths = [4000, *(1 + index * 37 % 300 for index in range(count - 1))]
    table = torch.randint(0, num_blocks, (count, 64), device=CUDA)
    positions = torch.tensor(lengths, device=CUDA) - 1
    q = random(count, heads, 128)
    cut = cut_contexts(positions, kv, replace(RUNS, programs=programs))
    out = paged_decode(q, pages, table, positions, 0, scale, cut).view_as(q)
    for _ in range(3):
        assert torch.equal(paged_decode(q, pages, table, positions, 0, scale, cut).view_as(q), out)
    assert not cut.arrived.any()
    for row, length in enumerate(lengths):
        keys, values = pages[table[row], 0].transpose(0, 1).transpose(1, 2).flatten(2, 3)[:, :, :length].float()
        scores = q[row].float().view(kv, -1, 128) @ keys.transpose(1, 2) * scale
        assert error(out[row], (scores.softmax(-1) @ values).view(heads, 128)) < 5e-3, (row, length)


def test_decode_at_the_end_of_a_pool_of_more_than_2_to_the_32_elements() -> None:
    from workers.kernels.context_runs import cut_contexts
    from workers.kernels.latent_decode import latent_decode, programs_of

    num_blocks, layers = 4400, 27
    pages = torch.empty(num_blocks, layers, BLOCK, 576, dtype=BF16, device=CUDA)
    assert pages.numel() > 1 << 32
    pages[-3:] = torch.randn(3, layers, BLOCK, 576, device=CUDA).to(BF16)
    table = torch.tensor([[num_blocks - 1, num_blocks - 3]], device=CUDA)
    q, rope = random(1, 16, 512), random(1, 16, 64)
    positions = torch.tensor([99], device=CUDA)
    cut = cut_contexts(positions, programs_of(16), latent_tactic(1, 16))
    out = latent_decode(q, rope, pages, table, layers - 1, 0.05, cut)
    rows = pages[table[0], layers - 1].flatten(0, 1)[:100].float()
    want = (torch.cat((q[0], rope[0]), -1).float() @ rows.t() * 0.05).softmax(-1) @ rows[:, :512]
    assert error(out[0], want) < 5e-3

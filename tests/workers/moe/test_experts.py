"""Experts over slots against the sum written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.moe.experts import ExpertWeights, compute

D, INNER, SLOTS = 12, 20, 7
_generator = torch.Generator().manual_seed(0)
EXPERTS = [
    ExpertWeights(
        torch.randn(INNER, D, generator=_generator),
        torch.randn(INNER, D, generator=_generator),
        torch.randn(D, INNER, generator=_generator),
    )
    for _ in range(SLOTS)
]


def one(x: Tensor, slot: int) -> Tensor:
    gate, up, down = EXPERTS[slot]
    return down @ (F.silu(gate @ x) * (up @ x))


def some(num_tokens: int, per_token: int, *, missing: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, D, generator=generator)
    slots = torch.stack([torch.randperm(SLOTS, generator=generator)[:per_token] for _ in range(num_tokens)])
    if missing:
        slots[torch.rand(slots.shape, generator=generator) < 0.4] = -1
    return x, slots, torch.rand(slots.shape, generator=generator)


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("missing", [False, True])
def test_weighted_sum_and_parts(num_tokens: int, missing: bool) -> None:
    x, slots, weights = some(num_tokens, 3, missing=missing)
    parts = torch.stack(
        [
            torch.stack([one(x[t], slot) if slot >= 0 else torch.zeros(D) for slot in slots[t].tolist()])
            for t in range(num_tokens)
        ]
    )
    torch.testing.assert_close(compute(x, slots, None, EXPERTS.__getitem__), parts, rtol=1e-4, atol=1e-4)
    wanted = (parts * weights.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(compute(x, slots, weights, EXPERTS.__getitem__), wanted, rtol=1e-4, atol=1e-4)


def test_only_slots_with_tokens_are_read_each_once() -> None:
    x, slots, weights = torch.randn(3, D), torch.tensor([[5, 1], [1, -1], [-1, 5]]), torch.ones(3, 2)
    read: list[int] = []

    def weights_of(slot: int) -> ExpertWeights:
        read.append(slot)
        return EXPERTS[slot]

    compute(x, slots, weights, weights_of)
    assert sorted(read) == [1, 5]


def test_nothing_to_do() -> None:
    x = torch.randn(2, D)
    assert torch.equal(compute(x, torch.full((2, 3), -1), torch.ones(2, 3), EXPERTS.__getitem__), torch.zeros(2, D))
    empty = compute(x[:0], torch.empty(0, 3, dtype=torch.int64), torch.ones(0, 3), EXPERTS.__getitem__)
    assert empty.shape == (0, D)


def test_half_precision_adds_up_in_fp32() -> None:
    x, slots, weights = some(5, 3, missing=False)
    halves = [ExpertWeights(*(part.bfloat16() for part in expert)) for expert in EXPERTS]
    got = compute(x.bfloat16(), slots, weights, halves.__getitem__)
    assert got.dtype == torch.bfloat16
    parts = compute(x.bfloat16(), slots, None, halves.__getitem__)
    assert torch.equal(got, (parts.float() * weights.unsqueeze(-1)).sum(1).bfloat16())

"""Products with blocked weights against plain ones."""

from __future__ import annotations

import pytest
import torch

from workers.layers.blocked_linear import BlockedLinear, block_all
from workers.layers.linear import Partition


@pytest.mark.parametrize(("size_in", "size_out"), [(64, 512), (33, 7), (512, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_a_plain_one_does(size_in: int, size_out: int, bias: bool) -> None:
    """For any number of rows, none included, contiguous or not."""
    linear = BlockedLinear(size_in, size_out, partition=Partition.COLUMN, bias=bias, dtype=torch.float32)
    for parameter in linear.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    rows = torch.randn(300, 2 * size_in, generator=torch.Generator().manual_seed(2))
    inputs = [rows[:count, first : first + size_in] for count in (0, 1, 8, 33, 300) for first in (0, size_in)]
    plain = [linear(x) for x in inputs]
    with torch.inference_mode():
        block_all(torch.nn.Sequential(linear))
    assert linear._blocked is not None
    for x, wanted in zip(inputs, plain, strict=True):
        torch.testing.assert_close(linear(x), wanted, rtol=1e-5, atol=1e-4)


def test_other_types_stay_as_they_are() -> None:
    linear = BlockedLinear(8, 8, partition=Partition.ROW, dtype=torch.bfloat16)
    linear.weight.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    plain = linear(x)
    linear.block()
    assert linear._blocked is None and torch.equal(linear(x), plain)


def test_some_are_left_out() -> None:
    linears = [BlockedLinear(4, 4, partition=Partition.ROW, dtype=torch.float32) for _ in range(2)]
    model = torch.nn.ModuleDict({"encoder": torch.nn.Sequential(linears[0]), "encoder_like": linears[1]})
    block_all(model, but="encoder")
    assert [linear._blocked is None for linear in linears] == [True, False]

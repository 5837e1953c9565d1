"""Tables of addresses: what is in them, and when they are used again."""

from __future__ import annotations

import numpy as np
import torch

from kvtransfer.address_tables import AddressTables


class Flag:
    """An event of a stream."""

    def __init__(self) -> None:
        self.is_over = False

    def query(self) -> bool:
        return self.is_over


def allocate(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.int64)


def test_a_table_is_used_again_when_its_copy_is_over_and_not_before() -> None:
    tables, first, second = AddressTables(allocate), Flag(), Flag()
    one = tables.take(64)
    tables.lend(one, first)
    other = tables.take(64)
    assert other is not one
    tables.lend(other, second)
    second.is_over = True
    assert tables.take(64) not in (one, other), "copies of one stream end in order"
    first.is_over = True
    assert {tables.take(64), tables.take(64)} == {one, other}


def test_a_table_that_is_too_small_makes_room_for_a_larger_one() -> None:
    tables, over = AddressTables(allocate), Flag()
    over.is_over = True
    small = tables.take(1)
    assert small.capacity == 1024
    tables.lend(small, over)
    large = tables.take(1025)
    assert large is not small and large.capacity == 2048
    tables.lend(large, over)
    assert tables.take(2) is large


def test_sources_come_before_destinations() -> None:
    table = AddressTables(allocate).take(3)
    high = 1 << 63  # an address that int64 has as a negative number
    table.fill(np.array([1, 2, high], np.uint64), np.array([4, 5, 6], np.uint64))
    assert table.storage[:6].tolist() == [1, 2, -high, 4, 5, 6]
    table.fill(np.array([7], np.uint64), np.array([8], np.uint64))
    assert table.storage[:2].tolist() == [7, 8]

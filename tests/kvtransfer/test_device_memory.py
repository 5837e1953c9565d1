"""Where another process's addresses are in this one. What the driver does is tested on GPUs: tests/gpu/test_ipc.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import NotRegistered
from kvtransfer.device_memory import AddressMap, Opened

RANGES = [Opened(theirs=1 << 40, here=5000, num_bytes=4096), Opened(theirs=2 << 20, here=1 << 50, num_bytes=64)]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4095), st.integers(1, 64)), min_size=1))
def test_every_row_lies_where_its_range_does(rows: list[tuple[int, int, int]]) -> None:
    placed = [
        (RANGES[number], offset % (RANGES[number].num_bytes - length + 1), length) for number, offset, length in rows
    ]
    addresses = np.array([each.theirs + offset for each, offset, _ in placed], np.uint64)
    lengths = np.array([length for _, _, length in placed], np.uint64)
    assert AddressMap(RANGES)(addresses, lengths).tolist() == [each.here + offset for each, offset, _ in placed]


@pytest.mark.parametrize(
    ("address", "num_bytes"),
    [((2 << 20) - 1, 2), ((2 << 20) + 32, 33), ((2 << 20) + 64, 1), ((1 << 40) + 4095, 2), (1 << 60, 1), (0, 1)],
)
def test_a_row_outside_is_named(address: int, num_bytes: int) -> None:
    rows = np.array([2 << 20, address], np.uint64), np.array([64, num_bytes], np.uint64)
    with pytest.raises(NotRegistered, match=f"{num_bytes} bytes at {address:#x}"):
        AddressMap(RANGES)(*rows)

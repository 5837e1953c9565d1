"""The prefix index against sets in a dict, whatever happens to seats and blocks, rebuilds included."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.hashing import block_hashes
from router.holder_table import MAX_LOAD, HolderTable, Keys
from router.prefix_index import PrefixIndex, keys_of, prefix_depths


class PlainIndex:
    """The same, from seat to the set of its keys."""

    def __init__(self) -> None:
        self.held: dict[int, set[int]] = {}

    def depth(self, seat: int, keys: Sequence[int]) -> int:
        return next((i for i, key in enumerate(keys) if key not in self.held[seat]), len(keys))


def depths(index: PrefixIndex, keys: Keys) -> dict[int, int]:
    """By seat, those with none left out."""
    return {seat: int(depth) for seat, depth in enumerate(prefix_depths(index.holders(keys))) if depth}


def as_keys(numbers: Sequence[int]) -> Keys:
    """Few buckets for many keys: the low bits are those of a small number."""
    return np.array([number % 7 + 1 | number << 20 for number in numbers], np.uint64)


blocks = st.lists(st.integers(0, 3000), min_size=0, max_size=600, unique=True)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.just(0), st.just([])),
        st.tuples(st.sampled_from(("store", "store", "remove", "retire")), st.integers(0, 9), blocks),
    ),
    max_size=24,
)


@settings(max_examples=60, deadline=None)
@given(steps=steps, chain=blocks, num_fillers=st.integers(0, 3))
def test_it_agrees_with_sets_whatever_happens(
    steps: list[tuple[str, int, list[int]]], chain: list[int], num_fillers: int
) -> None:
    index, plain = PrefixIndex(), PlainIndex()
    for filler in range(num_fillers):  # near the next rebuild
        seat = index.open_seat()
        index.store(seat, np.arange(1, 900, dtype=np.uint64) + np.uint64(1000 * filler + 10**9))
        index.retire_seat(seat)
    for kind, which, numbers in steps:
        seats = list(plain.held)
        if kind == "open":
            seat = index.open_seat()
            assert seat not in plain.held and index.num_held(seat) == 0
            plain.held[seat] = set()
        elif seats:
            seat = seats[which % len(seats)]
            if kind == "store":
                index.store(seat, as_keys(numbers))
                plain.held[seat] |= set(numbers)
            elif kind == "remove":
                index.remove(seat, as_keys(numbers))
                plain.held[seat] -= set(numbers)
            else:
                index.retire_seat(seat)
                del plain.held[seat]
        expected = {seat: plain.depth(seat, chain) for seat in plain.held}
        assert depths(index, as_keys(chain)) == {seat: depth for seat, depth in expected.items() if depth}
    assert index.num_blocks == sum(len(keys) for keys in plain.held.values())
    assert [index.num_held(seat) for seat in plain.held] == [len(keys) for keys in plain.held.values()]


def test_seats_come_and_go_while_rows_move() -> None:
    """More seats than a word has, each used again after a rebuild; nothing of a retired one is ever found."""
    random, numbers, index = Random(0), np.random.default_rng(0), PrefixIndex()
    held: dict[int, Keys] = {}
    most = 0
    for turn in range(500):
        seat = index.open_seat()
        assert seat not in held
        held[seat] = numbers.integers(1, 2**64, 300, np.uint64)
        index.store(seat, held[seat])
        most = max(most, seat)
        if len(held) > 90:
            gone = random.choice(list(held))
            index.retire_seat(gone)
            keys = held.pop(gone)
            assert depths(index, keys) == {}
        if turn % 100 == 0:
            for seat, keys in held.items():
                assert depths(index, keys) == {seat: 300}
    assert most < 7 * 64  # of 500: numbers are used again
    assert index.num_blocks == 300 * len(held) and index.num_bytes < 8 << 20


def test_rows_that_nobody_holds_do_not_add_up() -> None:
    """A cache that evicts as much as it stores: the table stays as large as what is held wants it."""
    index = PrefixIndex()
    seat, keys = index.open_seat(), np.arange(1, 200_001, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for first in range(0, len(keys), 500):
        index.store(seat, keys[first : first + 500])
        if first >= 5000:
            index.remove(seat, keys[first - 5000 : first - 4500])
    assert index.num_held(seat) == 5000 == index.num_blocks
    assert index.num_bytes < 2_000_000


def test_a_prefix_ends_where_a_block_is_missing() -> None:
    index = PrefixIndex()
    first, second = index.open_seat(), index.open_seat()
    keys = keys_of(block_hashes(b"root", range(64), 4))
    index.store(first, keys)
    index.store(second, keys[1:])
    index.remove(first, keys[9:10])
    assert depths(index, keys) == {first: 9}
    assert depths(index, keys[1:9]) == {first: 8, second: 8}
    assert depths(index, keys[:0]) == {}


def test_keys_are_the_first_bytes_of_hashes_and_never_zero() -> None:
    digest = blake2b(b"x", digest_size=16).digest()
    assert keys_of([digest, bytes(16)]).tolist() == [int.from_bytes(digest[:8], "little"), 1]
    assert keys_of(digest + digest).tolist() == keys_of([digest] * 2).tolist()
    with pytest.raises(ValueError, match="17 bytes are no whole number of 16-byte hashes"):
        keys_of(digest + b"x")


def test_a_table_finds_every_key_at_its_highest_load() -> None:
    table = HolderTable(1000, 1)
    random = Random(2)
    keys = np.array([random.getrandbits(64) | 1 for _ in range(int(MAX_LOAD * table.num_rows))], np.uint64)
    assert table.has_room(len(keys)) and table.add(keys, 5) == len(keys) == table.num_used
    assert not table.has_room(table.num_rows)
    assert sorted(set(table.find(keys).tolist())) == sorted(table.find(keys).tolist())
    assert (table.holders(keys) == 1 << 5).all() and not table.holders(keys + np.uint64(2)).all()
    assert table.add(keys, 5) == 0 and table.discard(keys, 5) == len(keys) and table.discard(keys, 5) == 0

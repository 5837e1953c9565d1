"""The chain's root: whose cached blocks a request may meet."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.hashing import block_hashes, chain_root, root_of, salt_of

texts = st.text(max_size=6)


@settings(max_examples=300, deadline=None)
@given(st.tuples(texts, texts), st.tuples(texts, texts))
def test_equal_salts_come_of_equal_owners_and_requests_only(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (salt_of(*one) == salt_of(*other)) == (one == other)
    assert (salt_of(*one) == "") == (one == ("", ""))


def test_nobody_writes_himself_into_the_salt_of_another_owner() -> None:
    assert salt_of("ann", "x") != salt_of("", "3:annx") and salt_of("a", "b") != salt_of("ab", "")


def test_another_salt_shares_no_block() -> None:
    tokens = list(range(64))
    chains = [block_hashes(chain_root(b"m" * 16, salt=salt), tokens, 4) for salt in ("", "1:a", "1:b")]
    assert len({block for chain in chains for block in chain}) == 3 * 16
    assert chains[1] == block_hashes(chain_root(b"m" * 16, salt="1:a"), tokens, 4)


def test_a_root_of_another_length_is_none() -> None:
    assert root_of(b"") is None and root_of(b"r" * 16) == b"r" * 16
    with pytest.raises(ValueError, match="15 bytes are no root"):
        root_of(b"r" * 15)

"""Guesses from the text itself, against a search that looks at every place."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.speculative.ngram import NgramProposer

ID = 7


def searched(tokens: Sequence[int], ngram: int, count: int) -> tuple[int, ...]:
    """What stands behind the latest earlier place of the last `ngram` tokens, over and over where the text ends."""
    run = list(tokens[-ngram:])
    for place in range(len(tokens) - 1, ngram - 1, -1):
        if list(tokens[place - ngram : place]) == run:
            text = list(tokens)
            for offset in range(count):
                text.append(text[place + offset])
            return tuple(text[len(tokens) :])
    return ()


@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=60),
    st.lists(st.integers(1, 40), max_size=8),
    st.integers(1, 3),
    st.integers(1, 6),
)
def test_equals_a_search_of_the_whole_text(tokens: list[int], pieces: list[int], ngram: int, count: int) -> None:
    """However the text grows between two questions."""
    proposer = NgramProposer(count, ngram)
    asked = 0
    for piece in [*pieces, len(tokens)]:
        asked = min(len(tokens), asked + piece)
        told = tokens[:asked]
        assert proposer.propose(ID, told, count) == (searched(told, ngram, count) if len(told) > ngram else ())


@pytest.mark.parametrize("count", [1, 4])
def test_long_texts_and_large_token_ids(count: int) -> None:
    """Beyond the first table; ids that need more than 16 bits."""
    text = [150_000 + (number * number) % 211 for number in range(5000)]
    proposer = NgramProposer(count, 3)
    found = 0
    for known in [100, 101, 700, 701, 702, 3000, 4999, 5000]:
        told = text[:known]
        guess = proposer.propose(ID, told, count)
        assert guess in ((), searched(told, 3, count))  # a later run may have taken its place in the table
        found += bool(guess)
    assert found >= 5


def test_asks_for_no_more_than_there_is_room() -> None:
    proposer = NgramProposer(4, 2)
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    assert proposer.propose(ID, text, 9) == (3, 4, 5, 6)
    assert proposer.propose(ID, text, 2) == (3, 4)
    assert proposer.propose(ID, text, 0) == ()
    assert proposer.propose(ID + 1, [1, 2, 3, 3, 3], 4) == (3, 3, 3, 3), "what repeats goes on repeating"


def test_wrong_guesses_make_it_modest_and_right_ones_bold() -> None:
    proposer = NgramProposer(4, 2)
    text = [1, 2] * 8

    def ask() -> int:
        return len(proposer.propose(ID, text, 9))

    def judge(num_accepted: int) -> None:
        proposer.judged(ID, ask(), num_accepted, len(text))

    assert ask() == 4
    judge(0)
    assert ask() == 2
    judge(1)
    assert ask() == 2, "some right, some wrong: as before"
    judge(0)
    assert ask() == 1
    judge(0)
    assert ask() == 0
    text += [1, 2] * 15
    assert ask() == 0
    text += [1, 2]
    assert ask() == 1, "another try after a while"
    judge(1)
    judge(2)
    assert ask() == 4
    judge(4)
    assert ask() == 4, "no more than it may"


def test_forgets_and_hears_of_nobody() -> None:
    proposer = NgramProposer(4, 2)
    text = [1, 2] * 4
    proposer.propose(ID, text, 4)
    proposer.judged(ID, 4, 0, len(text))
    proposer.forget(ID)
    proposer.forget(ID)
    proposer.judged(ID, 4, 0, len(text))
    assert len(proposer.propose(ID, text, 9)) == 4, "a new one"

"""What is predicted counts for its time, then no more; and never more of it than is kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router import predicted as module
from router.holder_table import Keys
from router.predicted import PREDICTED_S, Predicted, mark
from router.prefix_index import prefix_depths


def chain(first: int, count: int = 10) -> Keys:
    return np.arange(first, first + count, dtype=np.uint64)


def depths(predicted: Predicted, keys: Keys, now: float, num_words: int = 2) -> dict[int, int]:
    bits = np.zeros((len(keys), num_words), np.uint64)
    mark(bits, predicted.find(keys, now))
    return {seat: int(depth) for seat, depth in enumerate(prefix_depths(bits)) if depth}


def test_a_prediction_counts_for_its_time_and_at_most_half_as_long_again() -> None:
    predicted = Predicted()
    predicted.add({3, 70}, chain(1), now=100.0)
    predicted.add({5}, chain(1, 4), now=102.4)  # the same window
    predicted.add({6}, chain(1, 2), now=104.0)  # the next one
    assert depths(predicted, chain(1), 104.0) == {3: 10, 70: 10, 5: 4, 6: 2}
    assert depths(predicted, chain(1), 100.0 + PREDICTED_S) == {3: 10, 70: 10, 5: 4, 6: 2}
    assert depths(predicted, chain(1), 100.0 + 1.5 * PREDICTED_S) == {6: 2}
    assert depths(predicted, chain(1), 104.0 + 1.5 * PREDICTED_S) == {}


def test_what_is_predicted_adds_to_what_is_held() -> None:
    """The index knows the first blocks of a seat, a prediction all; or the index knows the last ones."""
    predicted = Predicted()
    predicted.add({1}, chain(1, 10), now=0.0)
    predicted.add({2}, chain(1, 4), now=0.0)
    bits = np.zeros((10, 1), np.uint64)
    bits[:4] = 1 << 1 | 1 << 3
    bits[4:9] = 1 << 2
    mark(bits, predicted.find(chain(1), 0.0))
    assert prefix_depths(bits)[:4].tolist() == [0, 10, 9, 4]


turns = st.lists(st.integers(1, 3), min_size=1, max_size=8)


@given(
    sent=st.lists(st.tuples(turns, st.sets(st.integers(0, 3), min_size=1)), max_size=30), asked=turns, gone=st.data()
)
def test_it_agrees_with_sets_of_prefixes(
    sent: list[tuple[list[int], set[int]]], asked: list[int], gone: st.DataObject
) -> None:
    """Chains part and meet as words of three letters do; a block is the word up to it."""
    predicted = Predicted()
    plain: dict[int, set[tuple[int, ...]]] = {seat: set() for seat in range(4)}

    def keys(word: list[int]) -> Keys:
        return np.array([int("".join(map(str, word[: end + 1]))) for end in range(len(word))], np.uint64)

    for number, (word, seats) in enumerate(sent):
        predicted.add(seats, keys(word), now=0.4 * (number // 5))  # all within the shortest time, in some windows
        for seat in seats:
            plain[seat] |= {tuple(word[: end + 1]) for end in range(len(word))}
    retired = gone.draw(st.integers(0, 3))
    predicted.forget(retired)
    plain[retired].clear()
    expected = {
        seat: sum(tuple(asked[: end + 1]) in words for end in range(len(asked))) for seat, words in plain.items()
    }
    assert depths(predicted, keys(asked), 2.4) == {seat: depth for seat, depth in expected.items() if depth}


def test_a_seat_that_is_retired_is_predicted_no_more() -> None:
    predicted = Predicted()
    predicted.add({3, 4}, chain(1), now=0.0)
    predicted.forget(3)
    predicted.forget(200)  # of more words than any window has
    assert depths(predicted, chain(1), 1.0) == {4: 10}
    predicted.add({200}, chain(1), now=1.0)
    assert depths(predicted, chain(1), 1.0, num_words=4) == {4: 10, 200: 10}
    assert depths(predicted, chain(1), 1.0, num_words=1) == {4: 10}


def test_too_many_predictions_push_out_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WINDOW_BYTES", 80_000)
    predicted, size = Predicted(), 10_000  # blocks of 8 bytes
    for number in range(6):
        predicted.add({number}, chain(1 + number * size, size), now=0.0)
    seen = [number for number in range(6) if depths(predicted, chain(1 + number * size), 0.0)]
    assert seen == [2, 3, 4, 5]

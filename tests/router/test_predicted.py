"""What is predicted counts for its time, then no more; and never more of it than is kept."""

from __future__ import annotations

import numpy as np

from router import predicted as module
from router.holder_table import Keys
from router.predicted import PREDICTED_S, Predicted
from router.prefix_index import prefix_depths


def chain(first: int, count: int = 10) -> Keys:
    return np.arange(first, first + count, dtype=np.uint64)


def depths(predicted: Predicted, keys: Keys, now: float, num_words: int = 2) -> dict[int, int]:
    bits = np.zeros((len(keys), num_words), np.uint64)
    predicted.add_holders(keys, bits, now)
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
    """The index knows the first blocks of a seat, a prediction the next ones."""
    predicted = Predicted()
    predicted.add({1}, chain(5, 6), now=0.0)
    bits = np.zeros((10, 1), np.uint64)
    bits[:4] = 1 << 1 | 1 << 2
    predicted.add_holders(chain(1), bits, 0.0)
    assert prefix_depths(bits)[:3].tolist() == [0, 10, 4]


def test_a_seat_that_is_retired_is_predicted_no_more() -> None:
    predicted = Predicted()
    predicted.add({3, 4}, chain(1), now=0.0)
    predicted.forget(3)
    predicted.forget(200)  # of more words than any window has
    assert depths(predicted, chain(1), 1.0) == {4: 10}
    predicted.add({200}, chain(1), now=1.0)
    assert depths(predicted, chain(1), 1.0, num_words=4) == {4: 10, 200: 10}
    assert depths(predicted, chain(1), 1.0, num_words=1) == {4: 10}


def test_too_many_predictions_push_out_the_oldest() -> None:
    predicted, size = Predicted(), module._WINDOW_ROWS
    for number in range(6):
        predicted.add({number}, chain(1 + number * size, size), now=0.0)
    seen = [number for number in range(6) if depths(predicted, chain(1 + number * size), 0.0)]
    assert seen == [2, 3, 4, 5]

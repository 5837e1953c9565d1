"""Which of the drawn tokens stand, over all ways in which guesses can be wrong."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.speculative.verify import standing

SMALL = st.integers(0, 2)


@given(drafts=st.lists(SMALL, max_size=6), data=st.data())
def test_tokens_stand_up_to_the_first_one_drawn_behind_a_wrong_guess(drafts: list[int], data: st.DataObject) -> None:
    drawn = data.draw(st.lists(SMALL, min_size=len(drafts) + 1, max_size=len(drafts) + 1))
    tokens = standing(drafts, drawn)
    right = len(tokens) - 1
    assert tokens == tuple(drawn[: right + 1])
    assert drafts[:right] == drawn[:right]
    assert right == len(drafts) or drafts[right] != drawn[right]

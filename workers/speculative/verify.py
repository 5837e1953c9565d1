"""What guesses are worth, once the model has drawn the token behind each of them.

A draw depends on nothing but the tokens before it, the seed and the position (workers.engine.sampler). So a guess that
equals the token drawn in its place is that token, greedy or not, and what was drawn behind it stands; the first guess
that differs ends it. The output is the one without guesses, token for token.
"""

from __future__ import annotations

from collections.abc import Sequence


def standing(drafts: Sequence[int], drawn: Sequence[int]) -> tuple[int, ...]:
    """The drawn tokens that stand: at least one. drawn: one token more than `drafts`, the first of them in the place of
    the first guess."""
    assert len(drawn) == len(drafts) + 1, f"{len(drawn)} tokens drawn for {len(drafts)} guesses"
    count = next((index for index, draft in enumerate(drafts) if draft != drawn[index]), len(drafts))
    return tuple(drawn[: count + 1])

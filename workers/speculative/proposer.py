"""Whoever guesses what texts go on with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Proposer(Protocol):
    """Engine thread only. It may guess whatever it likes: what is emitted does not depend on it."""

    def propose(self, id_: int, tokens: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """What may follow `tokens`, all that sequence `id_` has; at most `max_tokens`, () for no idea. `tokens` only
        grows from call to call."""
        ...

    def judged(self, id_: int, num_drafts: int, num_accepted: int, num_tokens: int) -> None:
        """Of its last guesses so many were right; it has `num_tokens` tokens now."""
        ...

    def forget(self, id_: int) -> None:
        """It has ended. Idempotent."""
        ...

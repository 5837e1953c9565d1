"""Runs of tokens that must not stand twice in a sequence (transformers' NoRepeatNGramLogitsProcessor)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable


class Repeats:
    """Follows one sequence, prompt included, at O(size) per token."""

    __slots__ = ("_following", "_tail")

    def __init__(self, size: int) -> None:
        """size: tokens of a run, at least 1."""
        self._tail: deque[int] = deque(maxlen=size - 1)  # the last tokens, the first part of a run
        self._following: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)

    def see(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if len(self._tail) == self._tail.maxlen:
                self._following[tuple(self._tail)].append(token)
            self._tail.append(token)

    def completing(self) -> list[int]:
        """The tokens that would repeat a run now; a token may be named twice."""
        return self._following.get(tuple(self._tail), []) if len(self._tail) == self._tail.maxlen else []

"""Token sequences that must not be completed (transformers' NoBadWordsLogitsProcessor)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable


class BadWords:
    """Follows one sequence, prompt included: a word may begin in the prompt. A step looks only at the words whose
    last but one token has just been seen."""

    __slots__ = ("_always", "_longer", "_tail")

    def __init__(self, words: Iterable[tuple[int, ...]]) -> None:
        """words: none is empty."""
        self._always: list[int] = []
        self._longer: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)  # by last but one token
        longest = 1
        for word in words:
            longest = max(longest, len(word))
            if len(word) == 1:
                self._always.append(word[0])
            else:
                self._longer[word[-2]].append(word)
        self._tail: deque[int] = deque(maxlen=longest - 1)

    def see(self, tokens: Iterable[int]) -> None:
        self._tail.extend(tokens)

    def completing(self) -> list[int]:
        """The tokens that would complete a word now; a token may be named twice."""
        if not self._tail or self._tail[-1] not in self._longer:
            return self._always
        tail = tuple(self._tail)
        words = self._longer[tail[-1]]
        return [*self._always, *(word[-1] for word in words if tail[1 - len(word) :] == word[:-1])]

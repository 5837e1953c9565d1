"""Guesses from the text itself: it goes on as it did where its last few tokens stood before.

Prompt lookup (Saxena 2023, "Prompt Lookup Decoding"), over prompt and emitted tokens, the latest place first. It costs
no model and pays where a text repeats itself: code that is edited, documents that are quoted, lists, JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

_FIRST_PLACES: Final = 1 << 9
_REST_TOKENS: Final = 32  # a text whose guesses were all wrong is left alone for so many tokens
_FEW: Final = 32  # runs that are entered one by one
_FACTOR: Final = 0x9E3779B97F4A7C15
_WORD: Final = (1 << 64) - 1


class NgramProposer:
    """A `Proposer`. Remembers where each run of `ngram_tokens` stood last, in a table of 8 to 16 bytes a token whose
    entries may overwrite each other; a place counts only if the run does stand there. O(1) per token.

    A sequence whose guesses are right gets more of them at a time, up to `max_draft_tokens`; one whose guesses are
    wrong gets fewer, then none for a while.
    """

    def __init__(self, max_draft_tokens: int, ngram_tokens: int) -> None:
        self._max_draft_tokens = max_draft_tokens
        self._ngram_tokens = ngram_tokens
        self._texts: dict[int, _Text] = {}

    def propose(self, id_: int, tokens: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        text = self._texts.get(id_)
        if text is None:
            text = self._texts[id_] = _Text(self._ngram_tokens, self._max_draft_tokens)
        count = min(text.allowance, max_tokens)
        if count <= 0 or len(tokens) < text.resumes_at:
            return ()
        place = text.latest(tokens)
        if place is None:
            return ()
        known = len(tokens)
        drafts = list(tokens[place : place + count])
        while len(drafts) < count:  # the run ends with the text: what repeats goes on repeating
            drafts.append(drafts[place + len(drafts) - known])
        return tuple(drafts)

    def judged(self, id_: int, num_drafts: int, num_accepted: int, num_tokens: int) -> None:
        text = self._texts.get(id_)
        if text is None:
            return
        if num_accepted == num_drafts:
            text.allowance = min(self._max_draft_tokens, 2 * text.allowance)
        elif num_accepted == 0:
            text.allowance //= 2
            if not text.allowance:
                text.allowance, text.resumes_at = 1, num_tokens + _REST_TOKENS

    def forget(self, id_: int) -> None:
        self._texts.pop(id_, None)


class _Text:
    """Of one sequence: the place behind each run, by a hash of the run."""

    __slots__ = ("_num_seen", "_places", "_size", "allowance", "resumes_at")

    def __init__(self, ngram_tokens: int, allowance: int) -> None:
        self._size = ngram_tokens
        self._places = np.zeros(_FIRST_PLACES, np.int32)  # 0: none, for a run has tokens before the place behind it
        self._num_seen = 0  # leading tokens whose runs are in the table
        self.allowance = allowance
        self.resumes_at = 0

    def latest(self, tokens: Sequence[int]) -> int | None:
        """The place behind the last earlier one where the run at the end of `tokens` stands."""
        known, size = len(tokens), self._size
        if known <= size:
            return None
        if known > len(self._places) // 2:
            self._places = np.zeros(1 << (2 * known).bit_length(), np.int32)
            self._num_seen = 0
        self._see(tokens, known - 1)
        run = tokens[known - size :]
        place = int(self._places[_hash(run) & (len(self._places) - 1)])
        return place if place and tokens[place - size : place] == run else None

    def _see(self, tokens: Sequence[int], end: int) -> None:
        """Enters the runs that end within the first `end` tokens."""
        size, mask = self._size, len(self._places) - 1
        first = max(size, self._num_seen + 1)  # the place behind the first run that is new
        self._num_seen = max(self._num_seen, end)
        if end - first < _FEW:
            for place in range(first, end + 1):
                self._places[_hash(tokens[place - size : place]) & mask] = place
            return
        new = np.array(tokens[first - size : end], np.uint64)
        hashes = np.zeros(end - first + 1, np.uint64)
        for offset in range(size):
            hashes = _mix(hashes + new[offset : offset + len(hashes)])
        # Of entries with one index the last one stays: numpy assigns in order.
        self._places[(hashes & np.uint64(mask)).astype(np.int64)] = np.arange(first, end + 1, dtype=np.int32)


def _hash(run: Sequence[int]) -> int:
    """As `_mix` gives it, token by token."""
    value = 0
    for token in run:
        value = (value + token) * _FACTOR & _WORD
        value ^= value >> 29
    return value


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = values * np.uint64(_FACTOR)
    return values ^ (values >> np.uint64(29))

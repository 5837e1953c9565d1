"""Penalties on tokens that a sequence has brought before, sparse: only the logits of such tokens are touched.

Repetition (Keskar et al. 2019, "CTRL"; transformers' RepetitionPenaltyLogitsProcessor), over prompt and emitted: a
positive logit is divided by the penalty, a negative one multiplied. Frequency and presence (OpenAI's API reference),
over emitted tokens only: logit − count · frequency − [count > 0] · presence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.request import SamplingParams

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float32]
_FIRST_IDS = 64


class TokenCounts:
    """The distinct tokens of one sequence and how often each was emitted. O(1) per token."""

    __slots__ = ("_counts", "_ids", "_places")

    def __init__(self) -> None:
        self._places: dict[int, int] = {}  # token id -> index into the arrays
        self._ids = np.zeros(_FIRST_IDS, np.int64)
        self._counts = np.zeros(_FIRST_IDS, np.float32)

    def see(self, prompt: Iterable[int]) -> None:
        for token in prompt:
            self._place(token)

    def emit(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            place = self._place(token)  # first: it may replace the array
            self._counts[place] += 1

    @property
    def ids(self) -> _Ints:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> _Floats:
        return self._counts[: len(self._places)]

    def _place(self, token: int) -> int:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        return place


class PenalisedRow(NamedTuple):
    row: int  # of the logits
    params: SamplingParams
    counts: TokenCounts


@dataclass(frozen=True, slots=True)
class Penalties:
    """One entry per (row, distinct token of its sequence), host arrays of one length; no entry twice."""

    rows: _Ints
    ids: _Ints
    counts: _Floats  # emitted
    repetition: _Floats  # 1: off
    frequency: _Floats
    presence: _Floats

    @classmethod
    def of(cls, penalised: Sequence[PenalisedRow]) -> Penalties:
        lengths = [len(each.counts.ids) for each in penalised]

        def spread(values: Iterable[float]) -> _Floats:
            return np.repeat(np.fromiter(values, np.float32, len(lengths)), lengths)

        return cls(
            rows=np.repeat(np.array([each.row for each in penalised], np.int64), lengths),
            ids=np.concatenate([each.counts.ids for each in penalised]),
            counts=np.concatenate([each.counts.counts for each in penalised]),
            repetition=spread(each.params.repetition_penalty for each in penalised),
            frequency=spread(each.params.frequency_penalty for each in penalised),
            presence=spread(each.params.presence_penalty for each in penalised),
        )

    def apply(self, logits: Tensor) -> None:
        """Changes logits [N, V], float32 or wider, in place."""

        def to(values: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(values).to(logits.device)

        at = (to(self.rows), to(self.ids))
        values = logits[at]
        repetition, counts = to(self.repetition), to(self.counts)
        values = torch.where(values < 0, values * repetition, values / repetition)
        values -= counts * to(self.frequency) + (counts > 0) * to(self.presence)
        logits[at] = values

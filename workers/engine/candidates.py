"""The likeliest tokens behind the beams of searches, with their adjusted log probabilities.

What adjusts the logits of other rows adjusts the log probabilities of these, as transformers does it: nothing is
renormalised, and a forced token costs nothing. Shapes: N drawing rows, R of which search, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.engine.beam_search import Candidate


class Best(NamedTuple):
    """Best first; on the device."""

    logprobs: Tensor  # [R, M] float32
    tokens: Tensor  # [R, M] int64


class BestTokens(NamedTuple):
    rows: list[int]  # of N
    counts: list[int]  # of candidates that each of them wants: at most M
    best: Best

    def collect(self, ids: list[int]) -> dict[int, tuple[Candidate, ...]]:
        """By sequence; `ids` [N]. Waits for the device."""
        found = zip(self.rows, self.counts, self.best.tokens.tolist(), self.best.logprobs.tolist(), strict=True)
        return {
            ids[row]: tuple(map(Candidate, tokens[:count], logprobs[:count])) for row, count, tokens, logprobs in found
        }


@dataclass(frozen=True, slots=True)
class SearchingRows:
    rows: npt.NDArray[np.int64]  # [R] of N
    counts: npt.NDArray[np.int64]  # [R]

    @classmethod
    def of(cls, num_candidates: npt.NDArray[np.int64]) -> SearchingRows | None:
        """num_candidates: [N], 0 where nobody searches. None: nobody does."""
        if not num_candidates.any():
            return None
        rows = np.flatnonzero(num_candidates)
        return cls(rows, num_candidates[rows])

    def normalise(self, logits: Tensor) -> Tensor:
        """The same logits [N, V] as float32, where searching rows have log probabilities."""
        logits = logits.float()
        at = torch.from_numpy(self.rows).to(logits.device)
        return logits.index_copy(0, at, logits[at].log_softmax(dim=-1))

    def best(self, adjusted: Tensor, bring: Callable[[Best], Best]) -> BestTokens:
        """adjusted: [N, V] from `normalise`. `bring` takes them to the host."""
        at = torch.from_numpy(self.rows).to(adjusted.device)
        found = adjusted[at].topk(min(int(self.counts.max()), adjusted.shape[1]), dim=-1)
        return BestTokens(self.rows.tolist(), self.counts.tolist(), bring(Best(found.values, found.indices)))

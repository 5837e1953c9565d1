"""Which texts a search goes on with, which it has found, and when it is over: values only.

The rules are those of transformers (generation/utils.py, GenerationMixin._beam_search), for one prompt. The search
begins with one beam, the prompt; a step turns B beams and the likeliest continuations of each into at most `num_beams`
others, best first. A continuation that ends its text is a hypothesis if it is among the `num_beams` best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cluster.request import Beams, EarlyStopping, FinishReason, Hypothesis


class Candidate(NamedTuple):
    """A token that may follow a beam."""

    token: int
    logprob: float  # of the model's distribution, adjusted; not renormalised


class Branch(NamedTuple):
    """A beam of the next step."""

    parent: int  # among the beams of this one
    token: int
    score: float  # sum of logprobs since the prompt


def num_candidates(num_beams: int, num_ends: int) -> int:
    """Of each beam: so many that enough are left when all the tokens that may end a text are among them."""
    return max(2, 1 + num_ends) * num_beams


class BeamSearch:
    """`advance` until it returns no branches; then `hypotheses`."""

    def __init__(self, beams: Beams, ends: frozenset[int], max_new_tokens: int) -> None:
        """ends: tokens that end a text."""
        self._beams = beams
        self._ends = ends
        self._max_new_tokens = max_new_tokens
        self._num_new = 0  # tokens of each beam behind the prompt
        self._scores = [0.0]
        self._found: list[Hypothesis] = []  # best first, at most num_beams

    @property
    def hypotheses(self) -> list[Hypothesis]:
        """Those that were asked for, as far as they were found; best first."""
        return self._found[: self._beams.num_returned]

    def advance(self, texts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Candidate]]) -> list[Branch]:
        """The beams after the next token; none: the search is over.

        texts: what each beam has behind the prompt. candidates: of each beam the likeliest, `num_candidates` of them
        or the whole vocabulary; those of no probability count as left out.
        """
        assert len(texts) == len(candidates) == len(self._scores), f"{len(self._scores)} beams"
        num_beams = self._beams.num_beams
        self._num_new += 1
        branches = [
            Branch(parent, token, score + logprob)
            for parent, (score, offered) in enumerate(zip(self._scores, candidates, strict=True))
            for token, logprob in offered
            if logprob > -math.inf
        ]
        branches.sort(key=lambda branch: (-branch.score, branch.parent, branch.token))
        is_last = self._num_new >= self._max_new_tokens
        for branch in branches[:num_beams]:
            if is_last or branch.token in self._ends:
                self._find(texts[branch.parent], branch)
        going_on = [] if is_last else [branch for branch in branches if branch.token not in self._ends][:num_beams]
        if not going_on or not self._may_improve(going_on[0].score):
            return []
        self._scores = [branch.score for branch in going_on]
        return going_on

    def _find(self, text: Sequence[int], branch: Branch) -> None:
        finish = FinishReason.STOP if branch.token in self._ends else FinishReason.LENGTH
        self._found.append(Hypothesis((*text, branch.token), self._normalised(branch.score, self._num_new), finish))
        self._found.sort(key=lambda hypothesis: -hypothesis.score)  # stable: of equals the earlier one
        del self._found[self._beams.num_beams :]

    def _may_improve(self, best_score: float) -> bool:
        if len(self._found) < self._beams.num_beams:
            return True
        early = self._beams.early_stopping
        if early is EarlyStopping.AT_ONCE:
            return False
        grows = early is EarlyStopping.IMPOSSIBLE and self._beams.length_penalty > 0
        length = self._max_new_tokens if grows else self._num_new
        return self._normalised(best_score, length) > self._found[-1].score

    def _normalised(self, score: float, num_tokens: int) -> float:
        return score / num_tokens**self._beams.length_penalty

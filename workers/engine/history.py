"""What a rank knows of the tokens of one sequence, and what the sampler derives from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cluster.errors import InvalidRequest
from cluster.request import SamplingParams
from workers.engine.bad_words import BadWords
from workers.engine.constraint import Constraint, ConstraintCompiler
from workers.engine.penalties import TokenCounts
from workers.engine.repeats import Repeats


class History:
    """Follows a sequence with `params.needs_history` token by token, at O(1) per token. Engine thread only.

    A pure function of (params, prompt, emitted): preemption, replay and handoff come to the same state.
    """

    __slots__ = (
        "_constraint",
        "_constraints",
        "_num_constrained",
        "_num_prompt",
        "_repeats",
        "_words",
        "counts",
        "params",
        "tokens",
    )

    def __init__(self, params: SamplingParams, num_prompt: int, constraints: ConstraintCompiler | None) -> None:
        self.tokens: list[int] = []  # prompt + emitted, as far as they are known here
        self.counts = TokenCounts() if params.has_penalties else None
        self._words = BadWords(params.bad_words) if params.bad_words else None
        self._repeats = Repeats(params.no_repeat_ngram_size) if params.no_repeat_ngram_size else None
        self.params = params
        self._num_prompt = num_prompt
        self._constraints = constraints
        self._constraint: Constraint | None = None
        self._num_constrained = num_prompt  # tokens that the constraint has been told of, prompt included

    @property
    def has_grammar(self) -> bool:
        return self.params.grammar is not None

    def extend(self, start: int, tokens: Sequence[int]) -> None:
        """These stand at positions start …; those that are known already change nothing."""
        known = len(self.tokens)
        assert start <= known, f"tokens {known} to {start} are unknown"
        new = tokens[known - start :]
        if not new:
            return
        self.tokens += new
        for follower in (self._words, self._repeats):
            if follower is not None:
                follower.see(new)
        if self.counts is not None:
            num_prompt = max(0, self._num_prompt - known)
            if self.params.repetition_penalty != 1.0:
                self.counts.see(new[:num_prompt])
            self.counts.emit(new[num_prompt:])

    def forbidden(self) -> list[int]:
        """The tokens that would complete a bad word, or repeat a run; a token may be named twice."""
        words = [] if self._words is None else self._words.completing()
        return words if self._repeats is None else [*words, *self._repeats.completing()]

    def fill(self, mask: npt.NDArray[np.uint32]) -> None:
        """As Constraint.fill, after all emitted tokens. Compiles at the first call; raises what the grammar raises."""
        grammar = self.params.grammar
        assert grammar is not None
        if self._constraint is None:
            if self._constraints is None:
                raise InvalidRequest("this worker has no grammar compiler; give the model a tokenizer.json", "grammar")
            self._constraint = self._constraints.compile(grammar)
        if self._num_constrained < len(self.tokens):
            self._constraint.advance(self.tokens[self._num_constrained :])
            self._num_constrained = len(self.tokens)
        self._constraint.fill(mask)

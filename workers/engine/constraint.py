"""What a grammar lets one sequence emit next, as the sampler sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cluster.request import Grammar


class Constraint(Protocol):
    """The state of one sequence's grammar. Engine thread only."""

    def advance(self, tokens: Sequence[int]) -> None:
        """These were emitted, in this order. Tokens after the end of the text (EOS) change nothing."""
        ...

    def fill(self, mask: npt.NDArray[np.uint32]) -> None:
        """Sets bit t % 32 of word t // 32 for each token t that may come next, clears the others. [ceil(V / 32)].

        At least one bit is set: EOS where the text may end, and EOS alone where it must.
        """
        ...


class ConstraintCompiler(Protocol):
    """Grammars to constraints, for one vocabulary."""

    def check(self, grammar: Grammar) -> None:
        """Raises InvalidRequest for a grammar that is wrong or too large. Bounded in time, but not short."""
        ...

    def knows(self, grammar: Grammar) -> bool:
        """Whether `check` and `compile` have nothing to do but to look it up."""
        ...

    def compile(self, grammar: Grammar) -> Constraint:
        """At the start of the text. The grammar has been checked; equal grammars share what is compiled."""
        ...

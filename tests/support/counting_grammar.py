"""A grammar of a few lines: after n emitted tokens, those that equal n modulo a number may follow; then EOS alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cluster.errors import InvalidRequest
from cluster.request import Grammar, GrammarKind


def counting(modulus: int, *, length: int = 1_000_000, breaks_at: int = -1) -> Grammar:
    """length: tokens before the text must end. breaks_at: it raises when that many have been emitted."""
    return Grammar(GrammarKind.LARK, f"{modulus} {length} {breaks_at}")


class CountingConstraint:
    def __init__(self, text: str, vocab_size: int, eos: int) -> None:
        self.modulus, self.length, self.breaks_at = map(int, text.split())
        self.vocab_size = vocab_size
        self.eos = eos
        self.emitted: list[int] = []

    def advance(self, tokens: Sequence[int]) -> None:
        self.emitted += tokens

    def allowed(self) -> list[int]:
        count = len(self.emitted)
        if count == self.breaks_at:
            raise RuntimeError(f"the grammar broke at {count}")
        if count >= self.length:
            return [self.eos]
        return [
            token
            for token in range(self.vocab_size)
            if token % self.modulus == count % self.modulus and token != self.eos
        ]

    def fill(self, mask: npt.NDArray[np.uint32]) -> None:
        bits = np.zeros(32 * len(mask), np.uint32)
        bits[self.allowed()] = 1
        mask[:] = (bits.reshape(-1, 32) << np.arange(32, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)


class CountingCompiler:
    def __init__(self, vocab_size: int, eos: int = 0) -> None:
        self.vocab_size = vocab_size
        self.eos = eos
        self.num_compiled = 0

    def check(self, grammar: Grammar) -> None:
        if grammar.kind is not GrammarKind.LARK:
            raise InvalidRequest(f"{grammar.kind.name} is no counting grammar", "grammar")

    def knows(self, grammar: Grammar) -> bool:
        return True

    def compile(self, grammar: Grammar) -> CountingConstraint:
        self.num_compiled += 1
        return CountingConstraint(grammar.text, self.vocab_size, self.eos)

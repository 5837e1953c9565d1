"""Synthetic traces: conversations whose prompts grow, with beginnings that many of them share. Pure; seeded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from random import Random

from benchmarks.simulator.trace import TRACE_BLOCK, TraceRequest

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversations:
    """Sessions begin as a Poisson process, `sessions_per_s` times `swing` of the moment. Each takes one of the shared
    beginnings (a system prompt, tools, a document), the first ones far more often (Zipf), and some turns; a turn sends
    all that was said before, and comes a pause after the answer before it may be expected.

    Lengths in tokens; they are log-normal around their medians, turns are geometric, pauses exponential.
    """

    sessions_per_s: float
    span_s: float
    seed: int
    num_beginnings: int = 40
    beginning_tokens: int = 3000
    question_tokens: int = 400
    answer_tokens: int = 250
    spread: float = 0.8  # of the logarithm of lengths
    mean_turns: float = 4.0
    pause_s: float = 20.0
    token_s: float = 0.01  # of an answer: when the next question may come
    max_tokens: int = 30_000  # of a prompt: a session ends before
    trace_block: int = TRACE_BLOCK
    swing: Callable[[float], float] = field(default=lambda at_s: 1.0)  # at most 1

    def lasting(self, span_s: float) -> Conversations:
        return replace(self, span_s=span_s)

    def requests(self) -> list[TraceRequest]:
        """In order of arrival; none comes after `span_s`."""
        draw, ids = Random(self.seed), count()
        shares = [1 / (rank + 1) for rank in range(self.num_beginnings)]
        lengths = [self._length(draw, self.beginning_tokens) for _ in shares]
        beginnings = [[next(ids) for _ in range(length // self.trace_block)] for length in lengths]
        found: list[TraceRequest] = []
        for number, at_s in enumerate(self._starts(draw)):
            (which,) = draw.choices(range(self.num_beginnings), shares)
            found += self._session(draw, ids, at_s, f"s{number}", lengths[which], beginnings[which])
        return sorted((each for each in found if each.at_ms < 1000 * self.span_s), key=lambda each: each.at_ms)

    def _starts(self, draw: Random) -> Iterator[float]:
        at_s = 0.0
        while (at_s := at_s + draw.expovariate(self.sessions_per_s)) < self.span_s:
            if draw.random() < self.swing(at_s):
                yield at_s

    def _session(
        self, draw: Random, ids: Iterator[int], at_s: float, name: str, num_tokens: int, blocks: list[int]
    ) -> Iterator[TraceRequest]:
        blocks = list(blocks)  # those that are full: they stay as they are in the turns to come
        while True:
            num_tokens += self._length(draw, self.question_tokens)
            if num_tokens > self.max_tokens:
                return
            blocks += [next(ids) for _ in range(num_tokens // self.trace_block - len(blocks))]
            last = [next(ids)] if num_tokens % self.trace_block else []
            answer = self._length(draw, self.answer_tokens)
            yield TraceRequest(round(1000 * at_s, 3), num_tokens, answer, (*blocks, *last), name)
            if draw.random() * self.mean_turns < 1:
                return
            num_tokens += answer
            at_s += answer * self.token_s + draw.expovariate(1 / self.pause_s)

    def _length(self, draw: Random, median: int) -> int:
        return max(1, round(draw.lognormvariate(math.log(median), self.spread)))


def day(at_s: float) -> float:
    """Traffic of a day that begins at midnight, as a share of its peak in the afternoon."""
    return 0.55 - 0.45 * math.cos(2 * math.pi * (at_s / DAY_S - 1 / 12))

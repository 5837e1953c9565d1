"""Requests to come: when, how long, and with which tokens. A pure function of the seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float  # after the start; 0 when requests follow one another
    prompt: list[int]
    num_tokens: int  # of the answer
    text: str = ""  # what the prompt says; "": the token ids are sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Lengths are uniform, ends included. `rate` requests/s arrive as a Poisson process; 0: one after the other.

    The process is the one that has `num_requests` arrivals in `span_s`: that many times, uniform and independent. So
    what is offered is `rate` exactly, however short the run. With `words`, one-token words by their ids, prompts are
    text made of them; else they are token ids below `vocab_size`. About `long_share` of the prompts, drawn one by one,
    have lengths of `long_prompt_tokens`.
    """

    rate: float
    num_requests: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    vocab_size: int
    seed: int
    words: Mapping[int, str] | None = None
    long_prompt_tokens: tuple[int, int] = (0, 0)
    long_share: float = 0.0

    @property
    def span_s(self) -> float:
        return self.num_requests / self.rate if self.rate else 0.0

    def arrivals(self) -> list[Arrival]:
        """In order. Prompts are random tokens: none begins like another, and none like those of another seed."""
        draw = random.Random(f"{self.seed}/{self.rate}")
        times = sorted(draw.uniform(0, self.span_s) for _ in range(self.num_requests))
        token_ids = list(self.words) if self.words else range(self.vocab_size)
        found: list[Arrival] = []
        for at_s in times:
            is_long = self.long_share > 0 and draw.random() < self.long_share
            lengths = self.long_prompt_tokens if is_long else self.prompt_tokens
            prompt = [draw.choice(token_ids) for _ in range(draw.randint(*lengths))]
            text = "".join(self.words[token_id] for token_id in prompt) if self.words else ""
            found.append(Arrival(at_s, prompt, draw.randint(*self.output_tokens), text))
        return found

"""What the clients of chaos ask: chats that begin alike, short and long, greedy and seeded, one or two samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from cluster.request import SamplingParams
from tests.support.families import VOCAB_SIZE

NUM_SYSTEM_PROMPTS = 5


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt; a sample for each of `samplings`."""

    number: int
    prompt: tuple[int, ...]
    samplings: tuple[SamplingParams, ...]


def system_prompts(random: Random) -> list[tuple[int, ...]]:
    """What several questions begin with."""
    return [_text(random, random.randint(80, 160)) for _ in range(NUM_SYSTEM_PROMPTS)]


def draw(random: Random, number: int, system: list[tuple[int, ...]]) -> Question:
    shared = random.choice(system) if random.random() < 0.6 else ()
    own = _text(random, random.choice((random.randint(5, 40), random.randint(60, 200), random.randint(200, 260))))
    max_tokens = random.randint(20, 56)
    if random.random() < 0.5:
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    else:
        sampling = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            temperature=round(random.uniform(0.6, 1.1), 2),
            top_p=random.choice((1.0, 0.95)),
            top_k=random.choice((0, 50)),
            seed=random.randrange(1 << 31),
        )
    seeded = sampling.temperature > 0
    num_samples = 2 if seeded and random.random() < 0.4 else 1
    return Question(number, shared + own, tuple(_sample(sampling, index) for index in range(num_samples)))


def _sample(sampling: SamplingParams, index: int) -> SamplingParams:
    return replace(sampling, sample=index)


def _text(random: Random, length: int) -> tuple[int, ...]:
    return tuple(random.randrange(1, VOCAB_SIZE - 1) for _ in range(length))

"""A whole run: what is asked, what is done to whom and when, and that all are at rest at the end."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from random import Random

from tests.chaos.answers import Answered, answered
from tests.chaos.arena import Arena, arena
from tests.chaos.faults import Hand
from tests.chaos.record import End, Expected, Report, Run
from tests.chaos.what import NEEDS_TWO_HOSTS, STATES, State, What

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    seed: int = 0
    num_faults: int
    minutes: float  # no fault begins later
    num_questions: int = 96
    num_crowds: int = 2
    num_clients: int = 4  # of each ingress
    rest_every: int = 40  # faults
    settings: Mapping[str, object] = field(default_factory=dict)
    kinds: tuple[What, ...] = tuple(What)


def has_two_hosts() -> bool:
    """Whether this machine can be made into two."""
    return os.geteuid() == 0 and shutil.which("ip") is not None


def schedule(num_faults: int, kinds: tuple[What, ...], random: Random) -> list[tuple[What, State]]:
    """Every kind equally often, every kind in all states in turn, in random order."""
    chosen: list[tuple[What, State]] = []
    states = {what: cycle(random.sample(STATES, len(STATES))) for what in kinds}
    for what in cycle(random.sample(kinds, len(kinds))):
        if len(chosen) == num_faults:
            break
        chosen.append((what, next(states[what])))
    random.shuffle(chosen)
    return chosen


async def run(campaign: Campaign, report: Report, told: Callable[[str], None]) -> None:
    random = Random(campaign.seed)
    asked = answered(campaign.num_questions, campaign.seed)
    two_hosts = has_two_hosts()
    kinds = campaign.kinds if two_hosts else tuple(set(campaign.kinds) - NEEDS_TWO_HOSTS)
    two_hosts = two_hosts and not NEEDS_TWO_HOSTS.isdisjoint(kinds)
    each = [answer.question for answer in asked]
    async with arena(report, each, campaign.settings, num_crowds=campaign.num_crowds, two_hosts=two_hosts) as made:
        words = made.cluster.config.words
        left_out = {what: "needs root and iproute2" for what in campaign.kinds if what not in kinds}
        report.add(
            Run(
                seed=campaign.seed,
                commit=commit(),
                num_faults=campaign.num_faults,
                heartbeat_timeout_s=words.heartbeat_timeout_s,
                step_timeout_s=words.step_timeout_s,
                left_out={str(what): why for what, why in left_out.items()},
            )
        )
        write_expected(report, asked)
        await _strike(campaign, made, schedule(campaign.num_faults, kinds, random), random, told)
        report.add(End(at_s=made.now(), num_workers=len(made.cluster.workers)))


async def _strike(
    campaign: Campaign, made: Arena, faults: list[tuple[What, State]], random: Random, told: Callable[[str], None]
) -> None:
    hand = Hand(made, random, num_clients=campaign.num_clients)
    ends_at = time.monotonic() + 60 * campaign.minutes
    for number, (what, state) in enumerate(faults, 1):
        if time.monotonic() > ends_at:
            told(f"{number - 1} of {len(faults)} faults in {campaign.minutes:g} minutes")
            break
        began_at = made.now()
        await hand.strike(what, state)
        told(f"{number:4} {what} · {state}: {made.now() - began_at:.1f} s")
        if number % campaign.rest_every == 0:
            made.pace(0)
            await made.rest()
    made.pace(0)
    await made.rest()
    made.note_deaths()


def write_expected(report: Report, asked: list[Answered]) -> None:
    for answer in asked:
        question = answer.question
        for sampling, tokens in zip(question.samplings, answer.answers, strict=True):
            report.add(
                Expected(
                    question=question.number,
                    sample=sampling.sample,
                    num_prompt_tokens=len(question.prompt),
                    seeded=sampling.temperature > 0,
                    tokens=tokens,
                )
            )


def commit() -> str:
    """Empty where there is no repository."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()

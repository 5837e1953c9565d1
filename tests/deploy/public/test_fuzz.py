"""A small part of `python -m tests.fuzz`: nothing that a client sends does any harm."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.fuzz.campaign import Campaign, oracle_of, run
from tests.fuzz.census import Census
from tests.support.public_door import PublicDoor

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

NUM_PROCESSES = 5  # controller, two replicas, prefill and decode worker
MAX_GROWTH_BYTES = 200 << 20
NUM_CASES = {
    "completion": 24,
    "chat": 24,
    "form": 6,
    "embedding": 10,
    "tokens": 10,
    "repeat": 8,
    "mutant": 60,
    "writing": 40,
    "json": 40,
    "bytes": 20,
    "http": 30,
    "header": 20,
    "crumbs": 6,
    "vanish": 20,
}


@pytest.fixture(scope="module")
def campaign(door: PublicDoor) -> Iterator[Campaign]:
    """Nothing is left of it."""
    campaign = Campaign(door.url, oracle_of(door.tokenizer, json.loads((door.checkpoint / "config.json").read_text())))
    before = Census.take(door.url, NUM_PROCESSES)
    yield campaign
    Census.take(door.url, NUM_PROCESSES).check(before, MAX_GROWTH_BYTES)


@pytest.mark.parametrize("kind", NUM_CASES)
def test_cases(campaign: Campaign, kind: str) -> None:
    run(campaign.kinds()[kind], NUM_CASES[kind], chosen_seed=1)


def test_every_kind_has_cases(campaign: Campaign) -> None:
    assert set(campaign.kinds()) == set(NUM_CASES)

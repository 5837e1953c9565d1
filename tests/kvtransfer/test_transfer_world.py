"""Block table, ledger and connector together, under random operations and injected failures."""

from __future__ import annotations

from collections import Counter

import pytest

from kvtransfer.connector import Outcome
from tests.support.kv_world import World

NUM_BATCHES = 2
NUM_SEEDS = 200
NUM_OPERATIONS = 500


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_no_wrong_byte_is_ever_accepted_and_nothing_leaks(batch: int) -> None:
    """Invariants after every operation; see World.check and World.drain."""
    seen: Counter[str] = Counter()
    for seed in range(batch, NUM_SEEDS, NUM_BATCHES):
        world = World(seed)
        try:
            world.run(NUM_OPERATIONS)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        seen += world.seen
    everything = {*Outcome, "finished", "cancelled mid-read", "abandoned", "recomputed", "hits at the sink"}
    assert {what for what in everything if seen[what] < 10} == set(), f"too rare to mean anything: {seen}"
    assert seen["expired leases"]

"""10,000 steps of a worker's engine on a GPU under random load: bytes exact, all blocks free, no memory grows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import random_load
from tests.support.gpu_workers import FAMILIES, VOCAB_SIZE, assembled, driver, write_checkpoint
from tests.support.random_load import RandomLoad

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

NUM_STEPS, NUM_ROUNDS = 10_000, 5


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_thousand_steps_end_where_they_began(family: str, tmp_path: Path) -> None:
    parts = assembled(write_checkpoint(family, tmp_path), **{"kv.num_blocks": 48})
    load = RandomLoad(driver(parts), parts.pool, vocab_size=VOCAB_SIZE, max_prompt=500, max_tokens=120)
    idle = [load.run(NUM_STEPS // NUM_ROUNDS) for _ in range(NUM_ROUNDS)]
    print(load.counts, idle)
    for executor in parts.executors:
        executor.stop()
    assert load.counts.num_steps == NUM_STEPS
    random_load.check(load.counts, idle)

"""Random load on a CPU engine that prepares the next step meanwhile; tests/gpu has ten thousand steps of it."""

from __future__ import annotations

from tests.support import random_load
from tests.support.checkpoints import checkpoint
from tests.support.engines import LoadedEngine, limits
from tests.support.families import VOCAB_SIZE
from tests.support.random_load import RandomLoad
from workers.engine.overlap import OverlappedEngine
from workers.models.loader import load


def test_all_blocks_are_free_in_the_end_and_nothing_grows() -> None:
    wide = limits(max_batched_tokens=96, chunk_tokens=32, max_model_len=256)
    engine = LoadedEngine(load(checkpoint("llama")), num_blocks=49, scheduler_limits=wide)
    engine.engine = OverlappedEngine(engine.scheduler, engine.runner)
    rounds = RandomLoad(engine, engine.pool, vocab_size=VOCAB_SIZE, max_prompt=125, max_tokens=30)
    idle = [rounds.run(180) for _ in range(3)]
    random_load.check(rounds.counts, idle)

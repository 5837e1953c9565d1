"""The parts of a worker in this process: neither sessions nor any thread beside the engine's."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from cluster.config import SluiceConfig
from cluster.request import RequestKey, SamplingParams

if TYPE_CHECKING:
    from workers.assembly import Assembly


def lone_engine(config: SluiceConfig, pool: str) -> Assembly:
    """An engine as the workers of `pool` have it, for a process of its own."""
    from kvtransfer import nixl_transport
    from workers.assembly import WorkerSettings, assemble

    nixl_transport.prepare_environment()
    settings = WorkerSettings.of(config, pool, "alone", b"benchmark")
    return assemble(settings, lambda done: None)


def first_tokens(pipe: Connection, config: SluiceConfig, pool: str) -> None:
    """A process: for each (prompt, number of tokens) it answers (seconds to the first token, tokens found cached)."""
    from workers.engine.sequence import Sequence

    parts = lone_engine(config, pool)
    pipe.send("ready")
    number = 0
    while (request := pipe.recv()) is not None:
        prompt, num_tokens = request
        number += 1
        params = SamplingParams(max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True)
        start = time.perf_counter()
        stream = Sequence(number, RequestKey(str(number), 0), prompt, len(prompt), params, arrival=number)
        parts.scheduler.add(stream)
        first = 0.0
        while parts.engine.has_work:
            outcome = parts.engine.step()
            if not first and outcome is not None and outcome.tokens:
                first = time.perf_counter() - start
        pipe.send((first, stream.prefix_hit_tokens))

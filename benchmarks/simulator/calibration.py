"""What steps of a small model take on this machine, in one process: coefficients of a StepCost by least squares.

Steps of an engine as it runs in a worker: prompts of several lengths in chunks, then decoding in batches of several
sizes. Every step is run several times and the shortest time counts, so that neighbours disturb little.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.request import RequestKey, SamplingParams
from kvtransfer.layout import KvGeometry, RankLayout
from kvtransfer.pool import KvPool
from workers.attention.kv_views import kv_cache
from workers.engine.block_manager import BlockManager, GroupCapacity
from workers.engine.model_runner import ModelRunner
from workers.engine.scheduler import Scheduler, SchedulerLimits
from workers.engine.sequence import Sequence
from workers.engine.step_plan import ScheduledSequence
from workers.models import loader

Floats: TypeAlias = NDArray[np.float64]

PROMPTS = (16, 48, 96, 192, 384, 768, 1200)
BATCHES = (1, 2, 4, 8, 16)
_REPEATS = 3
_CHUNK = 512
_ROOT = b"calibration".ljust(16)


class StepTimes:
    """Measured steps of one model. The shares of a step are those of StepCost: fixed, tokens of prompts, the same by
    their context, decoding rows, their context."""

    def __init__(self, rows: SequenceOf[SequenceOf[ScheduledSequence]], seconds: Floats, block_bytes: int) -> None:
        self.seconds = seconds
        self.block_bytes = block_bytes
        self._shares = np.array([_shares(each) for each in rows])

    def fit(self) -> tuple[Floats, float]:
        """(the five coefficients, none negative; the median relative error of a step)"""
        weighted = self._shares / self.seconds[:, None]
        used = list(range(weighted.shape[1]))
        while True:
            found = np.linalg.lstsq(weighted[:, used], np.ones(len(weighted)), rcond=None)[0]
            if (found >= 0).all():
                break
            del used[int(found.argmin())]
        coefficients = np.zeros(weighted.shape[1])
        coefficients[used] = found
        return coefficients, float(np.median(np.abs(weighted @ coefficients - 1)))


def _shares(rows: SequenceOf[ScheduledSequence]) -> list[float]:
    chunks = [row for row in rows if row.num_tokens > 1]
    single = [row for row in rows if row.num_tokens == 1]
    return [
        1.0,
        float(sum(row.num_tokens for row in chunks)),
        sum(row.num_tokens * (row.start + row.num_tokens / 2) for row in chunks),
        float(len(single)),
        float(sum(row.start for row in single)),
    ]


def measure(checkpoint: Path, block_size: int) -> StepTimes:
    """Of a checkpoint that is loaded with dummy weights, on one thread."""
    torch.set_num_threads(1)
    model = loader.load(checkpoint, load_format="dummy").model
    groups = model.kv_groups(block_size)
    geometry = KvGeometry(groups, model.spec.rope_convention)
    num_blocks = 4 * sum(-(-(length + 64) // block_size) for length in PROMPTS)
    pool = KvPool.allocate(geometry, RankLayout(0, 0, 1), [num_blocks])
    caches = [kv_cache(group, regions) for group, regions in zip(groups, pool.regions, strict=True)]
    model.bind_kv(caches)

    def once() -> tuple[list[tuple[ScheduledSequence, ...]], list[float]]:
        blocks = BlockManager([GroupCapacity("self", num_blocks, block_size)], enable_prefix_cache=False)
        limits = SchedulerLimits(
            max_batched_tokens=2048, max_sequences=64, max_model_len=2048, prefill_reserve=0.0, chunk_tokens=_CHUNK
        )
        scheduler = Scheduler(blocks, limits, _ROOT)
        runner = ModelRunner(model, caches, pool.generations, [block_size], device=torch.device("cpu"))
        rows: list[tuple[ScheduledSequence, ...]] = []
        seconds: list[float] = []
        for number, (length, count) in enumerate(
            [*((p, 1) for p in PROMPTS), *((p, b) for p in PROMPTS[2:5] for b in BATCHES)]
        ):
            for index in range(count):
                identity = 100 * number + index
                scheduler.add(
                    Sequence(
                        identity,
                        RequestKey(str(identity), 1),
                        [(identity + 7 * place) % model.spec.vocab_size for place in range(length)],
                        length,
                        SamplingParams(max_tokens=8, ignore_eos=True),
                        arrival=identity,
                    )
                )
            while scheduler.has_work:
                started = time.perf_counter()
                plan = scheduler.schedule()
                scheduler.settle(plan, runner.launch(plan).collect())
                if plan.sequences:
                    rows.append(plan.sequences)
                    seconds.append(time.perf_counter() - started)
        return rows, seconds

    rows, _ = once()
    times = np.array([once()[1] for _ in range(_REPEATS)]).min(axis=0)
    return StepTimes(rows, times, sum(group.block_bytes() for group in groups))

"""Random arrivals, stops, cancels and pulls on an engine in process, and what is left of them when all have ended."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from random import Random

import psutil
import torch

from cluster.request import FinishReason, SamplingParams
from kvtransfer.pool import KvPool
from tests.support.engines import Driver
from workers.engine.sequence import Sequence, SequenceStatus

MAX_LIVE = 14
MAX_MARK = 16  # exact in every dtype that blocks have


@dataclass(slots=True)
class Counts:
    num_steps: int = 0
    num_finished: int = 0
    num_stopped: int = 0
    num_cancelled: int = 0
    num_preempted: int = 0
    num_pulled: int = 0
    num_refused: int = 0  # reservations for which there was no room
    num_reused: int = 0  # destination blocks that an ended sequence had


@dataclass(frozen=True, slots=True)
class Idle:
    """What is held while there is nothing to do."""

    device_bytes: int
    reserved_bytes: int
    host_bytes: int
    num_objects: int


@dataclass(frozen=True, slots=True)
class _Pull:
    sequence: Sequence
    blocks: torch.Tensor
    mark: int
    due: int  # the step before which it ends


class RandomLoad:
    """One group of blocks. Pulled bytes are marks, written at once by a stream of their own, as a read would; until a
    pull ends nobody else may write there."""

    def __init__(self, driver: Driver, pool: KvPool, *, vocab_size: int, max_prompt: int, max_tokens: int) -> None:
        self.counts = Counts()
        self._driver = driver
        self._pool = pool
        self._vocab_size = vocab_size
        self._max_prompt = max_prompt
        self._max_tokens = max_tokens
        self._random = Random(4)
        self._live: list[Sequence] = []
        self._pulls: list[_Pull] = []
        self._freed: set[int] = set()
        self._stream = torch.cuda.Stream(pool.device) if pool.device.type == "cuda" else None

    def run(self, num_steps: int) -> Idle:
        """So many steps, then all that lives is cancelled: nothing is held but memory."""
        for _ in range(num_steps):
            self._step()
        self._end_pulls(everything=True)
        while self._live:
            self._cancel(self._live[-1])
        self._driver.run()
        self._driver.outcomes.clear()
        self._driver.scheduler.check_integrity()
        blocks = self._driver.blocks
        blocks.clear_cache()
        blocks.drain_events()
        assert blocks.counts(0).free == self._pool.num_blocks[0] - 1, "all but the null block"
        return self._idle()

    def _step(self) -> None:
        random, counts = self._random, self.counts
        if len(self._live) < MAX_LIVE and random.random() < 0.5:
            self._live.append(self._driver.submit(self._prompt(), self._params()))
        if len(self._pulls) < 3 and random.random() < 0.2:
            self._begin_pull()
        self._end_pulls()
        if self._live and random.random() < 0.03:
            self._cancel(random.choice(self._live))
            counts.num_cancelled += 1
        outcome = self._driver.step()
        self._driver.outcomes.clear()
        self._driver.blocks.drain_events()  # a worker tells the routers of them
        counts.num_steps += 1
        if outcome is not None:
            assert outcome.error is None
            counts.num_stopped += sum(token.finish is FinishReason.STOP for token in outcome.tokens)
            counts.num_preempted += len(outcome.preempted)
        ended = [sequence for sequence in self._live if sequence.status is SequenceStatus.FINISHED]
        counts.num_finished += len(ended)
        self._live = [sequence for sequence in self._live if sequence.status is not SequenceStatus.FINISHED]
        if counts.num_steps % 100 == 0:
            self._driver.scheduler.check_integrity()

    def _prompt(self) -> list[int]:
        return [self._random.randrange(1, self._vocab_size) for _ in range(self._random.randint(2, self._max_prompt))]

    def _params(self) -> SamplingParams:
        random = self._random
        drawn = random.random() < 0.5
        stops = tuple(random.sample(range(self._vocab_size), self._vocab_size // 16)) if random.random() < 0.3 else ()
        return SamplingParams(
            max_tokens=random.randint(1, self._max_tokens),
            ignore_eos=True,
            stop_token_ids=stops,
            temperature=0.8 if drawn else 0.0,
            top_p=0.9 if drawn else 1.0,
            seed=random.randrange(1 << 30),
        )

    def _cancel(self, sequence: Sequence) -> None:
        for table in sequence.block_tables:  # none before it is admitted
            self._freed.update(table)
        self._driver.scheduler.abort(sequence)
        self._live.remove(sequence)

    # ------------------------------------------------------------ pulls

    def _begin_pull(self) -> None:
        sequence = self._driver.sequence(self._prompt(), self._params())
        reservation = self._driver.scheduler.reserve_for_pull(sequence)
        if reservation is None:
            self.counts.num_refused += 1
            self._driver.scheduler.abort(sequence)
            return
        destination = reservation.destination[0]
        self.counts.num_reused += len(self._freed.intersection(destination))
        mark = self._random.randint(1, MAX_MARK)
        blocks = torch.tensor(destination, device=self._pool.device)
        with self._writing():
            for region in self._pool.regions[0]:
                region[blocks] = mark
        if self._stream is not None:
            self._stream.synchronize()
        self._pulls.append(_Pull(sequence, blocks, mark, self.counts.num_steps + self._random.randint(1, 6)))

    def _writing(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _end_pulls(self, *, everything: bool = False) -> None:
        scheduler = self._driver.scheduler
        for pull in [pull for pull in self._pulls if everything or pull.due <= self.counts.num_steps]:
            self._pulls.remove(pull)
            for region in self._pool.regions[0]:
                assert bool((region[pull.blocks] == pull.mark).all()), "a step wrote where a pull was under way"
            self.counts.num_pulled += 1
            chance = self._random.random()
            if chance < 0.2:
                scheduler.release_pull(pull.sequence)  # parked, as when its source was silent for too long
            if chance < 0.4:
                scheduler.abort(pull.sequence)
            else:
                scheduler.pull_done(pull.sequence, self._random.randint(0, len(pull.sequence.tokens)))
                self._live.append(pull.sequence)

    # ------------------------------------------------------------ memory

    def _idle(self) -> Idle:
        gc.collect()
        device_bytes = reserved_bytes = 0
        if self._stream is not None:
            torch.cuda.synchronize(self._pool.device)
            device_bytes, reserved_bytes = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        return Idle(device_bytes, reserved_bytes, psutil.Process().memory_info().rss, len(gc.get_objects()))


def check(counts: Counts, idle: list[Idle]) -> None:
    """Everything happened, and between the second round and the last one nothing has grown: one more block of a model,
    one more object for each request would show."""
    assert counts.num_finished > counts.num_steps // 40 and counts.num_stopped > counts.num_steps // 400
    assert min(counts.num_cancelled, counts.num_preempted, counts.num_pulled, counts.num_reused) > 5, counts
    assert counts.num_refused > 0, counts
    early, late = idle[1], idle[-1]
    assert late.device_bytes <= early.device_bytes and late.reserved_bytes <= early.reserved_bytes
    assert late.host_bytes < early.host_bytes + (16 << 20)
    assert late.num_objects < early.num_objects + counts.num_finished // 8

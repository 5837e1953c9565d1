"""How a simulated worker fetches the first blocks of a prompt from another one's cache, and lends its own: what
workers/borrower.py and workers/lender.py do, where nothing fails. And the link that all its reads share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial

from benchmarks.simulator.step_cost import StepCost
from cluster.errors import RequestError
from cluster.protos import worker_pb2 as pb
from workers.engine.block_manager import BlockManager
from workers.engine.scheduler import Scheduler
from workers.engine.sequence import Sequence

Call = Callable[[], None]


class Link:
    """Reads of one worker, one after the other."""

    def __init__(self, cost: StepCost, loop: asyncio.AbstractEventLoop) -> None:
        self._cost = cost
        self._loop = loop
        self._free_at = 0.0

    def read(self, num_blocks: int, then: Callable[[Call], object], call: Call) -> None:
        """`then` is given `call` when they have arrived."""
        self._free_at = max(self._loop.time(), self._free_at) + self._cost.read_s(num_blocks)
        self._loop.call_at(self._free_at, then, call)


class Fetching:
    """`after_words` and `post` put a call on this worker's engine thread: a frame's way later, and at once. `peers`: of
    all workers, by incarnation."""

    def __init__(
        self,
        scheduler: Scheduler,
        blocks: BlockManager,
        block_size: int,
        link: Link,
        peers: Mapping[str, Fetching],
        after_words: Callable[[Call], None],
        post: Callable[[Call], None],
    ) -> None:
        self._scheduler = scheduler
        self._blocks = blocks
        self._block_size = block_size
        self._link = link
        self._peers = peers
        self.after_words = after_words
        self._post = post
        self._fetched: dict[int, int] = {}  # blocks, by id of the sequence
        self.num_open = 0  # fetches here, and blocks lent

    def begin(self, sequence: Sequence, holding: pb.Holding) -> bool:
        """Whether its first blocks are on their way; it joins the engine by itself then."""
        holder = self._peers.get(holding.holder.incarnation)
        end = min(holding.num_blocks, len(sequence.hashes), (len(sequence.tokens) - 1) // self._block_size)
        if holder is None or len(self._blocks.lookup(0, sequence.hashes, end)) >= end:
            return False
        try:
            reservation = self._scheduler.reserve_for_pull(sequence)
        except RequestError:
            return False
        if reservation is None:
            return False
        self.num_open += 1
        holder.after_words(partial(holder._lend, self, sequence, reservation.first_block, end))
        return True

    def take_fetched(self, sequence: Sequence) -> int:
        """Blocks that were fetched for it."""
        return self._fetched.pop(sequence.id, 0)

    def _lend(self, borrower: Fetching, sequence: Sequence, first: int, end: int) -> None:
        found = [(0, block) for block in self._blocks.lookup(0, sequence.hashes[first:end], end - first)]
        self._blocks.pin(found)
        self.num_open += 1
        borrower.after_words(partial(borrower._lent, self, sequence, first, found))

    def _lent(self, holder: Fetching, sequence: Sequence, first: int, found: list[tuple[int, int]]) -> None:
        arrived = partial(self._arrived, holder, sequence, first, found)
        if found:
            self._link.read(len(found), self._post, arrived)
        else:
            arrived()

    def _arrived(self, holder: Fetching, sequence: Sequence, first: int, found: list[tuple[int, int]]) -> None:
        self.num_open -= 1
        self._fetched[sequence.id] = len(found)
        self._scheduler.pull_done(sequence, (first + len(found)) * self._block_size)
        holder.after_words(partial(holder._returned, found))

    def _returned(self, blocks: list[tuple[int, int]]) -> None:
        self.num_open -= 1
        self._blocks.unpin(blocks)

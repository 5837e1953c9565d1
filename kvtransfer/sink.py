"""The sink's half of the planner: what is being read into which blocks. Engine thread, no bytes.

    plan ─> in flight ─ every rank reported, none STUCK ─> blocks unpinned, PullResult
                      └ every rank reported, one STUCK ──> blocks quarantined, PullResult
                                                             └ those ranks report again: nothing is written ──> free

A request may end at any moment and release its own references as usual: the pins of `plan` outlive them, so its reads
in flight keep their blocks until every rank has reported.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cluster.errors import TransferError
from cluster.request import RequestKey
from kvtransfer.ledger import BlockRef, Ledger
from kvtransfer.pull import BlockPair, BlockRaise, BlockRun, BlockSpan, Done, Outcome, Pull, names_together


@dataclass(frozen=True, slots=True)
class PullResult:
    """A pull that is over on every rank.

    After STUCK the destination blocks may still be written: the request must give them up and reserve others, it
    must not compute into them. After every other outcome they are its own again.
    """

    pull: Pull
    key: RequestKey
    outcome: Outcome  # the worst of all ranks
    stale: frozenset[int]  # indices of pull.pairs, from any rank
    num_bytes: int  # over all ranks
    seconds: float  # of the slowest rank
    errors: tuple[str, ...]
    transport: str  # what moved the data; "" where nothing could

    @property
    def valid_pairs(self) -> tuple[BlockPair, ...]:
        """What holds the source's bytes of the leased generation."""
        match self.outcome:
            case Outcome.OK:
                return self.pull.pairs
            case Outcome.STALE:
                return tuple(pair for index, pair in enumerate(self.pull.pairs) if index not in self.stale)
            case Outcome.LATE | Outcome.LOST | Outcome.STUCK:
                return ()


@dataclass(slots=True)
class _Flight:
    pull: Pull
    key: RequestKey
    dones: dict[int, Done] = field(default_factory=dict)  # by rank


class Sink:
    """Plans pulls and counts their completion per (rank, chunk): one pull is one chunk."""

    def __init__(self, ledger: Ledger, ranks: Sequence[int] = (0,)) -> None:
        self._ledger = ledger
        self._ranks = frozenset(ranks)
        self._ids = itertools.count(1)
        self._flights: dict[int, _Flight] = {}
        self._destinations: set[BlockRef] = set()
        self._stuck: dict[int, set[int]] = {}  # pull: ranks whose read, given up, is not over

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    @property
    def num_pinned_blocks(self) -> int:
        """Destination blocks of all reads in flight."""
        return len(self._destinations)

    def plan(
        self,
        key: RequestKey,
        peer: str,
        runs: Iterable[BlockRun],
        destinations: Iterable[BlockSpan],
        raises: Iterable[BlockRaise],
        now: float,
    ) -> Pull:
        """Pairs a ticket's runs with the request's own blocks, by their position in the block table.

        Pins the destination blocks: submit the pull to the executor of every rank, or they stay pinned.
        Raises TransferError, and changes nothing, when the ticket names a position that is not reserved, or one
        that a read in flight already fills.
        """
        table = {
            (span.group, span.first_index + offset): block
            for span in destinations
            for offset, block in enumerate(span.blocks)
        }
        pairs: list[BlockPair] = []
        generations: list[int] = []
        seen: set[BlockRef] = set()
        for run in runs:
            group = run.span.group
            for index, source_block, generation in run.indexed():
                sink_block = table.get((group, index))
                if sink_block is None:
                    raise TransferError(
                        f"ticket of {peer} for {key}: block {index} of group {group} is outside what is reserved"
                    )
                ref = BlockRef(group, sink_block)
                if ref in self._destinations or ref in seen:
                    raise TransferError(f"ticket of {peer} for {key}: block {index} of group {group} came twice")
                if source_block < 1 or generation < 1:
                    raise TransferError(
                        f"ticket of {peer} for {key}: block id {source_block}, generation {generation}; both start at 1"
                    )
                seen.add(ref)
                pairs.append(BlockPair(group, source_block, sink_block))
                generations.append(generation)
        if not pairs:
            raise TransferError(f"ticket of {peer} for {key} names no block")
        pull = Pull(next(self._ids), peer, tuple(pairs), tuple(generations), tuple(raises))
        self._ledger.post(pull.id, [BlockRef(group, block) for group, _, block in pairs], now)
        self._destinations |= seen
        self._flights[pull.id] = _Flight(pull, key)
        return pull

    def done(self, done: Done, now: float) -> PullResult | None:
        """Takes one rank's report; the result once every rank reported. Repeated reports are ignored, but for the one
        that follows STUCK when the read is over."""
        flight = self._flights.get(done.id)
        if flight is None:
            self._land(done)
            return None
        if done.rank in flight.dones and flight.dones[done.rank].outcome is not Outcome.STUCK:
            return None
        assert done.rank in self._ranks, f"rank {done.rank} of a sink with ranks {sorted(self._ranks)}"
        flight.dones[done.rank] = done
        if flight.dones.keys() < self._ranks:
            return None
        dones = list(flight.dones.values())
        outcome = max((each.outcome for each in dones), key=lambda each: each.severity)
        if outcome is Outcome.STUCK:
            self._ledger.lose(done.id)
            self._stuck[done.id] = {each.rank for each in dones if each.outcome is Outcome.STUCK}
        else:
            self._ledger.complete(done.id)
        self._forget(flight)
        return PullResult(
            pull=flight.pull,
            key=flight.key,
            outcome=outcome,
            stale=frozenset(index for each in dones for index in each.stale),
            num_bytes=sum(each.num_bytes for each in dones),
            seconds=max(each.seconds for each in dones),
            errors=tuple(each.error for each in dones if each.error),
            transport=names_together(each.transport for each in dones),
        )

    def num_pulls_of(self, key: RequestKey) -> int:
        """Its reads in flight. O(all reads in flight)."""
        return sum(flight.key == key for flight in self._flights.values())

    def check_integrity(self) -> None:
        """Asserts that the indexes agree. For tests and debugging."""
        refs = [BlockRef(group, block) for f in self._flights.values() for group, _, block in f.pull.pairs]
        assert len(refs) == len(self._destinations) and set(refs) == self._destinations, "destinations"
        assert self._ledger.num_posted == len(self._flights), "posted reads"

    def _land(self, done: Done) -> None:
        ranks = self._stuck.get(done.id)
        if ranks is None or done.outcome is Outcome.STUCK:
            return
        ranks.discard(done.rank)
        if not ranks:
            del self._stuck[done.id]
            self._ledger.land(done.id)

    def _forget(self, flight: _Flight) -> None:
        del self._flights[flight.pull.id]
        self._destinations.difference_update(BlockRef(group, block) for group, _, block in flight.pull.pairs)

"""Sequences whose encoder input is being read, here or elsewhere, and those that wait with its output for room to
decode.

Neither holds a block of a growing group, and what is being written is nobody's to take. An output that waits may be
taken back for an earlier sequence: its owner's input is then read again, unless it is still cached. Outputs on their
way from elsewhere hold at most 1 − prefill_reserve of their group, as other pulls do.
"""

from __future__ import annotations

from workers.engine.block_manager import BlockManager
from workers.engine.block_tables import BlockTables
from workers.engine.plan_builder import PlanBuilder
from workers.engine.projections import Projections
from workers.engine.pulls import PullReservation
from workers.engine.scheduler_limits import SchedulerLimits
from workers.engine.sequence import Sequence, SequenceStatus


class Encodes:
    """Of one shard."""

    def __init__(self, blocks: BlockManager, tables: BlockTables, limits: SchedulerLimits) -> None:
        self._blocks = blocks
        self._tables = tables
        self.projections = Projections(blocks)
        self._max_fetched = sum(limits.max_pull_blocks(group) for group in blocks.groups if group.is_fixed)
        self._num_fetched = 0  # blocks of those that are fetched
        self._reading: dict[int, Sequence] = {}  # ENCODING, here
        self._fetching: dict[int, Sequence] = {}  # ENCODING, elsewhere
        self._roots: set[bytes] = set()  # of both
        self._holding: dict[int, Sequence] = {}  # WAITING

    @property
    def num_reading(self) -> int:
        """Here."""
        return len(self._reading)

    def lacks(self, seq: Sequence) -> bool:
        """Whether its encoder input must be read before it can be admitted."""
        if seq.encoder_input is None or seq.id in self._holding:
            return False
        return seq.params.pooling is not None or not self._tables.has_cached_output(seq)  # a cache keeps no states

    def start(self, seq: Sequence, batch: PlanBuilder) -> bool:
        """WAITING -> ENCODING: reads its input in this step. False: not now, for want of budget, of blocks, or because
        a sequence with the same input is at it. Outputs that those behind it hold are taken back, the last one's
        first."""
        assert seq.encoder_input is not None
        tokens, root = seq.encoder_input
        if root in self._roots or len(tokens) > batch.encoder_budget or not self._occupy(seq, for_transfer=False):
            return False
        batch.encode(seq, len(tokens))
        seq.enter(SequenceStatus.ENCODING)
        self._reading[seq.id] = seq
        self._roots.add(root)
        return True

    def find(self, seq: Sequence, batch: PlanBuilder) -> None:
        """WAITING -> ENCODING: it only encodes, and the output is cached; the step brings it as if it were read."""
        self._tables.take_cached_output(seq)
        seq.enter(SequenceStatus.ENCODING)
        batch.found.append(seq)

    def done(self, seq: Sequence) -> None:
        """The step that read its input is over: the output is kept for it, and found by others. -> WAITING, if it wants
        more than that."""
        if seq.id in self._reading:
            self._tables.fill_output(seq)
        self.forget(seq)
        self._holding[seq.id] = seq
        if not seq.only_encodes:
            seq.enter(SequenceStatus.WAITING)

    def reserve(self, seq: Sequence) -> PullReservation | None:
        """WAITING -> ENCODING, elsewhere. None: not now, as in `start`."""
        assert seq.encoder_input is not None
        num_blocks = sum(self._tables.totals(seq, 0))
        if seq.encoder_input.root in self._roots or self._num_fetched + num_blocks > self._max_fetched:
            return None
        if not self._occupy(seq, for_transfer=True):
            return None
        seq.enter(SequenceStatus.ENCODING)
        self._fetching[seq.id] = seq
        self._num_fetched += num_blocks
        self._roots.add(seq.encoder_input.root)
        raises = [each for group, new in enumerate(seq.block_tables) for each in self._blocks.raises_of(group, new)]
        return PullReservation(0, 0, tuple(map(tuple, seq.block_tables)), tuple(raises))

    def landed(self, seq: Sequence, *, is_here: bool) -> None:
        """ENCODING -> WAITING: the output has arrived from elsewhere, or its blocks are given back."""
        assert seq.id in self._fetching, f"{seq} awaits nothing"
        if is_here:
            self._tables.fill_output(seq)
        self.forget(seq)
        seq.enter(SequenceStatus.WAITING)
        if is_here:
            self._holding[seq.id] = seq
        else:
            self._tables.drop(seq)

    def forget(self, seq: Sequence) -> None:
        """It was admitted, or it has ended. Its blocks are not touched; idempotent."""
        if self._fetching.pop(seq.id, None) is not None:
            self._num_fetched -= sum(map(len, seq.block_tables))
            self._leave_root(seq)
        if self._reading.pop(seq.id, None) is not None:
            self._leave_root(seq)
        self._holding.pop(seq.id, None)

    def _leave_root(self, seq: Sequence) -> None:
        assert seq.encoder_input is not None
        self._roots.remove(seq.encoder_input.root)

    def take_back(self, seq: Sequence) -> bool:
        """Gives up the output that waits with the last sequence behind `seq`. False: nobody behind it has one."""
        last = max(self._holding.values(), key=lambda each: each.order, default=None)
        if last is None or last.order < seq.order:
            return False
        self.forget(last)
        self._tables.drop(last)
        return True

    def _occupy(self, seq: Sequence, *, for_transfer: bool) -> bool:
        while not self._tables.occupy_output(seq, for_transfer=for_transfer):
            if not self.take_back(seq):
                return False
        return True

    def check_integrity(self) -> None:
        at_it = [*self._reading.values(), *self._fetching.values()]
        for seq in at_it:
            assert seq.status is SequenceStatus.ENCODING, f"{seq}"
        for seq in self._holding.values():
            assert seq.status is SequenceStatus.WAITING, f"{seq}"
        for seq in (*at_it, *self._holding.values()):
            own = [len(table) for group, table in enumerate(seq.block_tables) if seq.grows(group)]
            assert not any(own), f"{seq} holds {own} blocks of growing groups before it is admitted"
        assert len(self._roots) == len(at_it), f"{len(self._roots)} inputs of {len(at_it)} sequences"
        fetched = sum(len(table) for seq in self._fetching.values() for table in seq.block_tables)
        assert fetched == self._num_fetched, f"{fetched} blocks on their way, counted {self._num_fetched}"

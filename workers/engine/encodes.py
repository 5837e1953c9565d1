"""Sequences whose encoder input is being read, and those that wait with its output for room to decode.

Neither holds a block of a growing group, and what is being written is nobody's to take. An output that waits may be
taken back for an earlier sequence: its owner's input is then read again, unless it is still cached.
"""

from __future__ import annotations

from collections.abc import Iterable

from workers.engine.block_tables import BlockTables
from workers.engine.plan_builder import PlanBuilder
from workers.engine.sequence import Sequence, SequenceStatus


class Encodes:
    """Of one shard."""

    def __init__(self, tables: BlockTables) -> None:
        self._tables = tables
        self._reading: dict[int, Sequence] = {}  # ENCODING
        self._roots: set[bytes] = set()  # theirs
        self._holding: dict[int, Sequence] = {}  # WAITING

    @property
    def num_reading(self) -> int:
        return len(self._reading)

    def lacks(self, seq: Sequence) -> bool:
        """Whether its encoder input must be read before it can be admitted."""
        has = seq.encoder_input is None or seq.id in self._holding or self._tables.has_cached_output(seq)
        return not has

    def start(self, seq: Sequence, batch: PlanBuilder, behind: Iterable[Sequence]) -> bool:
        """Reads its input in this step. False: not now, for want of budget, of blocks, or because a sequence with the
        same input is at it. Outputs that those `behind` it hold are taken back, first ones first."""
        assert seq.encoder_input is not None
        tokens, root = seq.encoder_input
        if root in self._roots or len(tokens) > batch.encoder_budget:
            return False
        while not self._tables.occupy_output(seq):
            holder = next((other for other in behind if other.id in self._holding), None)
            if holder is None:
                return False
            self.forget(holder)
            self._tables.drop(holder)
        batch.encode(seq, len(tokens))
        self._reading[seq.id] = seq
        self._roots.add(root)
        return True

    def done(self, seq: Sequence) -> None:
        """The step that read its input is over: the output is kept for it, and found by others."""
        self._tables.fill_output(seq)
        self.forget(seq)
        self._holding[seq.id] = seq

    def forget(self, seq: Sequence) -> None:
        """It was admitted, or it has ended. Its blocks are not touched; idempotent."""
        if self._reading.pop(seq.id, None) is not None:
            assert seq.encoder_input is not None
            self._roots.remove(seq.encoder_input.root)
        self._holding.pop(seq.id, None)

    def check_integrity(self) -> None:
        for seq in self._reading.values():
            assert seq.status is SequenceStatus.ENCODING, f"{seq}"
        for seq in self._holding.values():
            assert seq.status is SequenceStatus.WAITING, f"{seq}"
        for seq in (*self._reading.values(), *self._holding.values()):
            own = [len(table) for group, table in enumerate(seq.block_tables) if seq.grows(group)]
            assert not any(own), f"{seq} holds {own} blocks of growing groups before it is admitted"
        assert len(self._roots) == len(self._reading), f"{len(self._roots)} inputs of {len(self._reading)} sequences"

"""Sequences whose KV comes from another worker, and what their reservations may hold."""

from __future__ import annotations

from dataclasses import dataclass

from workers.engine.block_manager import BlockManager, BlockRaise
from workers.engine.block_tables import BlockTables
from workers.engine.scheduler_limits import SchedulerLimits
from workers.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PullReservation:
    """Ask the source for the blocks from position `first_block` on, into `destination`."""

    first_block: int  # in the growing groups; everything before it was found in the cache
    hit_tokens: int
    destination: tuple[tuple[int, ...], ...]  # per group: the blocks from there on (fixed groups: all that are its own)
    raises: tuple[BlockRaise, ...]  # of the destination; the ranks apply them before the first read


class Pulls:
    """All PULLING sequences of a shard. They hold at most 1 − prefill_reserve of each group, cached blocks included,
    so that two workers which pull from each other always have room to compute."""

    def __init__(self, blocks: BlockManager, tables: BlockTables, limits: SchedulerLimits) -> None:
        self._blocks = blocks
        self._tables = tables
        self._max_blocks = [limits.max_pull_blocks(group) for group in blocks.groups]
        self._no_spare = [0] * len(self._max_blocks)
        self._num_blocks = [0] * len(self._max_blocks)
        self._sequences: dict[int, Sequence] = {}
        self._claim: tuple[int, int, int] | None = None

    def reserve(self, seq: Sequence) -> PullReservation | None:
        """Blocks for all its tokens; a sink that computes nothing may hit every full block. None: no room now."""
        assert seq.params.pooling is None, f"{seq}: a vector is read where the prompt is computed"
        totals = self._tables.totals(seq, len(seq.tokens))
        held = [have + total for have, total in zip(self._num_blocks, totals, strict=True)]
        if any(have > limit for have, limit in zip(held, self._max_blocks, strict=True)):
            return None
        max_hit_blocks = len(seq.tokens) // self._tables.block_size
        if not self._tables.occupy(seq, max_hit_blocks, spare=self._no_spare, for_transfer=True):
            self._claim = seq.order if self._claim is None else min(self._claim, seq.order)
            return None
        self._num_blocks = held
        self._sequences[seq.id] = seq
        first = seq.num_ready_blocks
        destination = tuple(
            tuple(table[first:] if seq.grows(index) else table if seq.encoder_input is None else ())
            for index, table in enumerate(seq.block_tables)
        )
        raises = [r for index, new in enumerate(destination) for r in self._blocks.raises_of(index, new)]
        return PullReservation(first, first * self._tables.block_size, destination, tuple(raises))

    def remove(self, seq: Sequence) -> None:
        """Before its tables change."""
        del self._sequences[seq.id]
        self._num_blocks = [have - len(table) for have, table in zip(self._num_blocks, seq.block_tables, strict=True)]

    def take_claim(self) -> tuple[int, int, int] | None:
        """The order of the first sequence that found no blocks since the last call."""
        claim, self._claim = self._claim, None
        return claim

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, seq: Sequence) -> bool:
        return seq.id in self._sequences

    def check_integrity(self) -> None:
        tables = [seq.block_tables for seq in self._sequences.values()]
        held = [sum(len(table[index]) for table in tables) for index in range(len(self._max_blocks))]
        assert held == self._num_blocks, f"pulls hold {held} blocks, counted {self._num_blocks}"
        assert all(have <= limit for have, limit in zip(held, self._max_blocks, strict=True)), f"{held} over the limit"

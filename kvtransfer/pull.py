"""The values that join planner and executor, and the block runs that travel in tickets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from cluster.protos import worker_pb2 as pb


class BlockRaise(Protocol):
    """A block and the generation that its rank must write before the block is written."""

    @property
    def group(self) -> int: ...
    @property
    def block(self) -> int: ...
    @property
    def generation(self) -> int: ...


class BlockPair(NamedTuple):
    group: int
    source_block: int
    sink_block: int


@dataclass(frozen=True, slots=True)
class BlockSpan:
    """Blocks at positions first_index, first_index + 1, ... of one group's block table of a request."""

    group: int
    first_index: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockRun:
    """A leased span of the source with the generation of each block."""

    span: BlockSpan
    generations: tuple[int, ...]

    @classmethod
    def of(cls, run: pb.BlockRun) -> BlockRun:
        """Raises ValueError when a block lacks its generation."""
        if len(run.block_ids) != len(run.generations):
            raise ValueError(
                f"run of group {run.group}: {len(run.block_ids)} blocks, {len(run.generations)} generations"
            )
        return cls(BlockSpan(run.group, run.first_index, tuple(run.block_ids)), tuple(run.generations))

    def wire(self) -> pb.BlockRun:
        return pb.BlockRun(
            group=self.span.group,
            first_index=self.span.first_index,
            block_ids=self.span.blocks,
            generations=self.generations,
        )

    def indexed(self) -> Iterator[tuple[int, int, int]]:
        """(position in the block table, source block, generation)"""
        for offset, (block, generation) in enumerate(zip(self.span.blocks, self.generations, strict=True)):
            yield self.span.first_index + offset, block, generation


@dataclass(frozen=True, slots=True)
class Pull:
    """One chunk of blocks to read, for every rank of the sink. `generations[i]` is what the source must still have
    for `pairs[i].source_block` after the read; `raises` are those of the destination blocks."""

    id: int
    peer: str
    pairs: tuple[BlockPair, ...]
    generations: tuple[int, ...]
    raises: tuple[BlockRaise, ...] = ()


class Outcome(StrEnum):
    """How a pull ended, mildest first."""

    OK = "ok"
    STALE = "stale"  # a generation differed: that block was reused
    LATE = "late"  # took longer than T
    LOST = "lost"  # the read failed: nothing of it is in flight
    STUCK = "stuck"  # given up: the destination may still be written

    @property
    def severity(self) -> int:
        return list(Outcome).index(self)


@dataclass(frozen=True, slots=True)
class Done:
    """What one rank reports about one pull: once, and after STUCK once more, LOST, when the read is over at last."""

    id: int
    rank: int
    outcome: Outcome
    num_bytes: int = 0  # read by this rank
    seconds: float = 0.0  # with a read in flight, the generation check included
    stale: tuple[int, ...] = ()  # indices of Pull.pairs whose generation differed
    error: str = ""  # LOST: what the transport said
    transport: str = ""  # what moved the data; "" where nothing could


def names_together(transports: Iterable[str]) -> str:
    """Of several ranks: mostly one name, "ipc+nixl" where ranks differ, "" of none."""
    return "+".join(sorted({each for each in transports if each}))

"""The blocks of one group: their states, the lists they stand in, and the counts that add up to the self."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from heapq import heappop, heappush
from typing import NamedTuple

NULL_BLOCK = 0


class BlockState(Enum):
    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    CACHED = "cached"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class GroupCapacity:
    name: str
    num_blocks: int  # without the null block
    block_size: int  # tokens
    is_fixed: bool = False  # holds what an encoder made for a sequence; otherwise grows with its tokens
    is_projected: bool = False  # and decoders read what a step makes of that first (projections.py)

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.block_size < 1:
            raise ValueError(f"group {self.name}: {self.num_blocks} blocks of {self.block_size} tokens")


class BlockCounts(NamedTuple):
    """They add up to the pool, always."""

    free: int
    filling: int
    ready: int
    cached: int
    quarantined: int


class BlockGroup:
    """The blocks of one group. Lists are indexed by block id; index 0 is the null block and stays unused."""

    __slots__ = (
        "cached",
        "capacity",
        "fence",
        "fenced",
        "free",
        "generation",
        "hash",
        "holds",
        "num_filling",
        "num_quarantined",
        "num_ready",
        "refs",
        "registry",
        "state",
    )

    def __init__(self, capacity: GroupCapacity) -> None:
        size = capacity.num_blocks + 1
        self.capacity = capacity
        self.state = [BlockState.FREE] * size
        self.refs = [0] * size
        self.holds = [0] * size
        self.generation = [0] * size
        self.fence = [0] * size
        self.hash: list[bytes | None] = [None] * size  # set only while registered
        self.registry: dict[bytes, int] = {}
        self.free = list(range(capacity.num_blocks, 0, -1))  # popped from the end
        self.fenced: list[tuple[int, int]] = []  # heap of (fence, block): free, but a step in flight may touch it
        self.cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self.num_filling = 0
        self.num_ready = 0
        self.num_quarantined = 0

    def counts(self) -> BlockCounts:
        num_free = len(self.free) + len(self.fenced)
        return BlockCounts(num_free, self.num_filling, self.num_ready, len(self.cached), self.num_quarantined)

    def enter(self, block: int, state: BlockState, retired: int) -> None:
        """Leaves the block's state for `state`, keeping lists and counters."""
        match self.state[block]:
            case BlockState.FILLING:
                self.num_filling -= 1
            case BlockState.READY:
                self.num_ready -= 1
            case BlockState.QUARANTINED:
                self.num_quarantined -= 1
            case BlockState.CACHED:
                del self.cached[block]
            case BlockState.FREE:
                pass  # taken out by `take`
        self.state[block] = state
        match state:
            case BlockState.FILLING:
                self.num_filling += 1
            case BlockState.READY:
                self.num_ready += 1
            case BlockState.QUARANTINED:
                self.num_quarantined += 1
            case BlockState.CACHED:
                self.cached[block] = None
            case BlockState.FREE:
                if self.fence[block] > retired:
                    heappush(self.fenced, (self.fence[block], block))
                else:
                    self.free.append(block)

    def has(self, count: int, *, for_transfer: bool, retired: int) -> bool:
        available = len(self.free)
        if not for_transfer:
            return count <= available + len(self.fenced) + len(self.cached)
        if count <= available:
            return True
        if count > available + len(self.cached):
            return False
        for block in self.cached:
            if self.fence[block] <= retired:
                available += 1
                if count <= available:
                    return True
        return False

    def take(self, *, for_transfer: bool, retired: int) -> tuple[int, bytes | None]:
        """A block to write into, and the hash that its eviction removed. `has` said there is one."""
        if not for_transfer and self.fenced:
            # Compute is ordered behind the step that may touch it; transfers need the others.
            return heappop(self.fenced)[1], None
        if self.free:
            return self.free.pop(), None
        for block in self.cached:
            if not for_transfer or self.fence[block] <= retired:
                removed = self.hash[block]
                assert removed is not None
                del self.registry[removed]
                self.hash[block] = None
                return block, removed
        raise AssertionError(f"group {self.capacity.name} is empty")

    def check_integrity(self) -> None:
        """Asserts that states, counts and lists agree. O(blocks)."""
        name, size = self.capacity.name, self.capacity.num_blocks
        counts = self.counts()
        assert sum(counts) == size, f"{name}: {counts} do not add up to {size}"
        free = [*self.free, *(block for _, block in self.fenced)]
        assert len(free) == len(set(free)), f"{name}: a block is free twice"
        seen = dict.fromkeys(BlockState, 0)
        for block in range(1, size + 1):
            state, refs, holds, hash_ = self.state[block], self.refs[block], self.holds[block], self.hash[block]
            where = f"{name} block {block} ({state.name}, {refs} refs, {holds} holds)"
            seen[state] += 1
            assert refs >= 0 and holds >= 0, where
            assert (state in (BlockState.FILLING, BlockState.READY)) == (refs > 0), where
            assert (state is BlockState.QUARANTINED) == (refs == 0 and holds > 0), where
            assert state is not BlockState.CACHED or (hash_ is not None and block in self.cached), where
            assert hash_ is None or (self.registry[hash_] == block and state is not BlockState.FILLING), where
            assert (state is BlockState.FREE) == (refs == 0 and holds == 0 and hash_ is None), where
        assert {block for block in range(1, size + 1) if self.state[block] is BlockState.FREE} == set(free), (
            f"{name}: free"
        )
        assert tuple(seen[state] for state in BlockState) == tuple(counts), f"{name}: {seen} is not {counts}"
        assert len(self.registry) == sum(hash_ is not None for hash_ in self.hash), f"{name}: registry"
        assert all(self.fence[block] == fence for fence, block in self.fenced), f"{name}: fence of a free block changed"
        assert self.refs[NULL_BLOCK] == self.holds[NULL_BLOCK] == self.generation[NULL_BLOCK] == 0, (
            f"{name}: null block"
        )

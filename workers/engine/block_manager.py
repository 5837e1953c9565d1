"""The one truth about KV blocks: who has them, what they hold, when they may be used again.

    FREE ── reserve ──> FILLING ── mark_ready ──> READY <── acquire ── CACHED
     ^                    │ last reference goes     │ last reference goes  │
     │<───────────────────┤                         ├── hash known ───────>│
     │<───────────────────│─────────────────────────┘ no hash              │
     │<── last hold ── QUARANTINED <── last reference goes while held      │
     └<───────────────────────────────── evicted (oldest first) ───────────┘

A reference belongs to a sequence, a lease or a posted read; a hold says that another process may still touch the
bytes though nobody here references them. A quarantined block whose content is valid and hashed may be hit again.
READY and CACHED blocks are never written. Block 0 of every group is the null block, outside the pool and its counts.
Engine thread only; nothing here takes a lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
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


class EventKind(Enum):
    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"


@dataclass(frozen=True, slots=True)
class GroupCapacity:
    name: str
    num_blocks: int  # without the null block
    block_size: int  # tokens

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.block_size < 1:
            raise ValueError(f"group {self.name}: {self.num_blocks} blocks of {self.block_size} tokens")


class BlockRaise(NamedTuple):
    """`generation` has to stand in the ranks' tables before the first write into the block. Ranks apply max()."""

    group: int
    block: int
    generation: int


class BlockEvent(NamedTuple):
    """For the router's prefix index. `hash` is empty for CLEARED, which covers the whole group."""

    kind: EventKind
    group: int
    hash: bytes


class BlockCounts(NamedTuple):
    """They add up to the pool, always."""

    free: int
    filling: int
    ready: int
    cached: int
    quarantined: int


class _Group:
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


class BlockManager:
    """Blocks of all groups of one shard. Implements `kvtransfer.ledger.BlockPins` (refs are (group, block) pairs)."""

    def __init__(self, groups: Sequence[GroupCapacity], *, enable_prefix_cache: bool = True) -> None:
        self._groups = [_Group(capacity) for capacity in groups]
        self._enable_prefix_cache = enable_prefix_cache
        self._retired = 0
        self._raises: list[BlockRaise] = []
        self._events: list[BlockEvent] = []

    @property
    def groups(self) -> tuple[GroupCapacity, ...]:
        return tuple(group.capacity for group in self._groups)

    @property
    def enable_prefix_cache(self) -> bool:
        return self._enable_prefix_cache

    # ------------------------------------------------------------------ allocation

    def can_reserve(self, counts: Sequence[int], *, for_transfer: bool = False) -> bool:
        """Whether `reserve` with the same arguments would succeed now."""
        assert len(counts) == len(self._groups), f"{len(counts)} counts for {len(self._groups)} groups"
        retired = self._retired
        return all(
            group.has(count, for_transfer=for_transfer, retired=retired)
            for group, count in zip(self._groups, counts, strict=True)
        )

    def reserve(self, counts: Sequence[int], *, for_transfer: bool = False) -> list[list[int]] | None:
        """Blocks to write into, `counts[g]` of group g: all groups or none.

        They are FILLING with one reference and a raised generation. CACHED blocks are evicted, oldest first.
        With `for_transfer` only blocks whose fence has been retired are used: no step in flight can touch them.
        """
        if not self.can_reserve(counts, for_transfer=for_transfer):
            return None
        return [self._take(index, count, for_transfer) for index, count in enumerate(counts)]

    def _take(self, index: int, count: int, for_transfer: bool) -> list[int]:
        group = self._groups[index]
        blocks: list[int] = []
        for _ in range(count):
            block, removed = group.take(for_transfer=for_transfer, retired=self._retired)
            if removed is not None:
                self._events.append(BlockEvent(EventKind.REMOVED, index, removed))
            group.enter(block, BlockState.FILLING, self._retired)
            group.refs[block] = 1
            group.generation[block] += 1
            self._raises.append(BlockRaise(index, block, group.generation[block]))
            blocks.append(block)
        return blocks

    def mark_ready(self, group: int, block: int, hash_: bytes | None) -> None:
        """FILLING -> READY: full and confirmed, never written again. Registers the hash if no other block has it."""
        pool = self._groups[group]
        assert pool.state[block] is BlockState.FILLING, f"block {block} of group {group} is {pool.state[block].name}"
        pool.enter(block, BlockState.READY, self._retired)
        if hash_ is not None and self._enable_prefix_cache and hash_ not in pool.registry:
            pool.registry[hash_] = block
            pool.hash[block] = hash_
            self._events.append(BlockEvent(EventKind.STORED, group, hash_))

    # ------------------------------------------------------------------ references

    def lookup(self, group: int, hashes: Sequence[bytes], max_blocks: int) -> list[int]:
        """Blocks of the longest known prefix of `hashes`, at most `max_blocks`. Takes no references."""
        registry = self._groups[group].registry
        found: list[int] = []
        for hash_ in hashes[:max_blocks]:
            block = registry.get(hash_)
            if block is None:
                break
            found.append(block)
        return found

    def acquire(self, group: int, blocks: Iterable[int]) -> None:
        """One more reference each, on blocks that hold something (anything but FREE)."""
        pool = self._groups[group]
        for block in blocks:
            state = pool.state[block]
            if pool.refs[block] == 0:
                assert state is BlockState.CACHED or pool.hash[block] is not None, f"block {block} is {state.name}"
                pool.enter(block, BlockState.READY, self._retired)
            pool.refs[block] += 1

    def release(self, group: int, blocks: Sequence[int], *, fence: int = 0) -> None:
        """One reference less each. `fence` is the last step that may still touch them, 0 if none does.

        The later blocks of the list are evicted before the earlier ones: a prefix outlives its continuation.
        """
        pool = self._groups[group]
        for block in reversed(blocks):
            assert pool.refs[block] > 0, f"block {block} of group {group} has no reference"
            pool.fence[block] = max(pool.fence[block], fence)
            pool.refs[block] -= 1
            if pool.refs[block] == 0:
                pool.enter(block, self._rest_state(pool, block), self._retired)

    def pin(self, refs: Sequence[tuple[int, int]], /) -> list[int]:
        """`acquire` over groups; returns the generations, one per ref."""
        for group, block in refs:
            self.acquire(group, (block,))
        return [self._groups[group].generation[block] for group, block in refs]

    def unpin(self, refs: Sequence[tuple[int, int]], /) -> None:
        for group, block in reversed(refs):
            self.release(group, (block,))

    def hold(self, refs: Sequence[tuple[int, int]], /) -> None:
        """Another process may still touch these referenced blocks: not reused until `unhold`, whoever lets go."""
        for group, block in refs:
            pool = self._groups[group]
            assert pool.refs[block] > 0, f"block {block} of group {group} is held without a reference"
            pool.holds[block] += 1

    def unhold(self, refs: Sequence[tuple[int, int]], /) -> None:
        for group, block in reversed(refs):
            pool = self._groups[group]
            assert pool.holds[block] > 0, f"block {block} of group {group} is not held"
            pool.holds[block] -= 1
            if pool.refs[block] == 0 and pool.holds[block] == 0:
                pool.enter(block, self._rest_state(pool, block), self._retired)

    @staticmethod
    def _rest_state(pool: _Group, block: int) -> BlockState:
        """Where a block without references belongs."""
        if pool.holds[block]:
            return BlockState.QUARANTINED
        return BlockState.FREE if pool.hash[block] is None else BlockState.CACHED

    # ------------------------------------------------------------------ fences, raises, events

    def retire_fences(self, completed_step: int) -> None:
        """All steps up to this one are over on the device: what they touched may become a transfer's destination."""
        self._retired = max(self._retired, completed_step)
        for pool in self._groups:
            while pool.fenced and pool.fenced[0][0] <= self._retired:
                pool.free.append(heappop(pool.fenced)[1])

    def drain_raises(self) -> list[BlockRaise]:
        """Generations raised since the last call, in order."""
        raises, self._raises = self._raises, []
        return raises

    def raises_of(self, group: int, blocks: Iterable[int]) -> list[BlockRaise]:
        """The current generations as raises, for a Pull that writes before the next plan comes."""
        generation = self._groups[group].generation
        return [BlockRaise(group, block, generation[block]) for block in blocks]

    def drain_events(self) -> list[BlockEvent]:
        """What changed in the prefix cache since the last call, in order."""
        events, self._events = self._events, []
        return events

    def clear_cache(self) -> None:
        """Forgets every prefix. CACHED blocks become FREE; referenced ones become so when their last user ends."""
        for index, pool in enumerate(self._groups):
            for hash_, block in pool.registry.items():
                assert pool.hash[block] == hash_
                pool.hash[block] = None
            pool.registry.clear()
            for block in list(pool.cached):
                pool.enter(block, BlockState.FREE, self._retired)
            self._events.append(BlockEvent(EventKind.CLEARED, index, b""))

    # ------------------------------------------------------------------ counts

    def state(self, group: int, block: int) -> BlockState:
        return self._groups[group].state[block]

    def generation(self, group: int, block: int) -> int:
        return self._groups[group].generation[block]

    def num_references(self, group: int, block: int) -> int:
        return self._groups[group].refs[block]

    def is_held(self, group: int, block: int) -> bool:
        return self._groups[group].holds[block] > 0

    def counts(self, group: int) -> BlockCounts:
        return self._groups[group].counts()

    def num_available(self, group: int) -> int:
        """What `reserve` without `for_transfer` can give: FREE and CACHED."""
        pool = self._groups[group]
        return len(pool.free) + len(pool.fenced) + len(pool.cached)

    def registered_hashes(self, group: int) -> list[bytes]:
        """For an index dump: every hash a lookup would find now."""
        return list(self._groups[group].registry)

    def check_integrity(self) -> None:
        """Asserts that states, counts and lists agree. O(blocks): for tests and debugging."""
        for pool in self._groups:
            _check_group(pool)


def _check_group(pool: _Group) -> None:
    name, size = pool.capacity.name, pool.capacity.num_blocks
    counts = pool.counts()
    assert sum(counts) == size, f"{name}: {counts} do not add up to {size}"
    free = [*pool.free, *(block for _, block in pool.fenced)]
    assert len(free) == len(set(free)), f"{name}: a block is free twice"
    seen = dict.fromkeys(BlockState, 0)
    for block in range(1, size + 1):
        state, refs, holds, hash_ = pool.state[block], pool.refs[block], pool.holds[block], pool.hash[block]
        where = f"{name} block {block} ({state.name}, {refs} refs, {holds} holds)"
        seen[state] += 1
        assert refs >= 0 and holds >= 0, where
        assert (state in (BlockState.FILLING, BlockState.READY)) == (refs > 0), where
        assert (state is BlockState.QUARANTINED) == (refs == 0 and holds > 0), where
        assert state is not BlockState.CACHED or (hash_ is not None and block in pool.cached), where
        assert hash_ is None or (pool.registry[hash_] == block and state is not BlockState.FILLING), where
        assert (state is BlockState.FREE) == (refs == 0 and holds == 0 and hash_ is None), where
    assert {block for block in range(1, size + 1) if pool.state[block] is BlockState.FREE} == set(free), f"{name}: free"
    assert tuple(seen[state] for state in BlockState) == tuple(counts), f"{name}: {seen} is not {counts}"
    assert len(pool.registry) == sum(hash_ is not None for hash_ in pool.hash), f"{name}: registry"
    assert all(pool.fence[block] == fence for fence, block in pool.fenced), f"{name}: fence of a free block changed"
    assert pool.refs[NULL_BLOCK] == pool.holds[NULL_BLOCK] == pool.generation[NULL_BLOCK] == 0, f"{name}: null block"

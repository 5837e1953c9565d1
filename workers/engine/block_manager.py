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

from collections.abc import Iterable, Sequence
from enum import Enum
from heapq import heappop
from typing import NamedTuple

from workers.engine.block_group import NULL_BLOCK, BlockCounts, BlockGroup, BlockState, GroupCapacity

__all__ = [
    "NULL_BLOCK",
    "BlockCounts",
    "BlockEvent",
    "BlockManager",
    "BlockRaise",
    "BlockState",
    "EventKind",
    "GroupCapacity",
]


class EventKind(Enum):
    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"


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


class BlockManager:
    """Blocks of all groups of one shard. Implements `kvtransfer.ledger.BlockPins` (refs are (group, block) pairs)."""

    def __init__(self, groups: Sequence[GroupCapacity], *, enable_prefix_cache: bool = True) -> None:
        self._groups = [BlockGroup(capacity) for capacity in groups]
        kinds = ([group for group in self._groups if group.capacity.is_fixed is fixed] for fixed in (False, True))
        self._kinds = [kind for kind in kinds if kind]  # what is named alike: prefixes, and outputs of encoders
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
    def _rest_state(pool: BlockGroup, block: int) -> BlockState:
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
        """What changed in the caches of prefixes and of encoders' outputs since the last call, in order."""
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

    def registered_hashes(self, group: int, /) -> list[bytes]:
        """For an index dump: every hash a lookup would find now."""
        return list(self._groups[group].registry)

    def is_registered(self, hash_: bytes, /) -> bool:
        """Whether a lookup would find it: in every growing group, or in every fixed one."""
        return any(all(hash_ in pool.registry for pool in kind) for kind in self._kinds)

    def check_integrity(self) -> None:
        """Asserts that states, counts and lists agree. O(blocks): for tests and debugging."""
        for pool in self._groups:
            pool.check_integrity()

"""What changed in this worker's caches, of prefixes and of encoders' outputs, numbered, for the indexes of the routers.
The last changes are kept.

Changes are gathered for some milliseconds and told as what came of them: which blocks a lookup finds now, and which
ones no more. An ingress that subscribes, or that misses a number, says which one it has last and gets those after it,
or a dump of everything where they are no longer kept. The answer begins with that number, or with the dump's, so that
an ingress that misses nothing hears so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Final, Protocol

from cluster.protos import worker_pb2 as pb
from workers.engine.block_manager import BlockEvent, EventKind

MAX_KEPT: Final = 1024  # batches
MAX_KEPT_HASHES: Final = 1 << 17


class PrefixCache(Protocol):
    """What the block manager tells. Its thread only."""

    def drain_events(self) -> list[BlockEvent]: ...

    @property
    def groups(self) -> Sized: ...

    def is_registered(self, hash_: bytes, /) -> bool:
        """In every group of its kind."""
        ...

    def registered_hashes(self, group: int, /) -> list[bytes]: ...


@dataclass(frozen=True, slots=True)
class _Batch:
    id: int
    cleared: bool
    removed: Sequence[bytes]
    stored: Sequence[bytes]

    @property
    def num_hashes(self) -> int:
        return len(self.removed) + len(self.stored)

    def wire(self, shard: int) -> pb.BlockEvents:
        return pb.BlockEvents(
            shard=shard,
            id=self.id,
            cleared=self.cleared,
            removed=b"".join(self.removed),
            stored=b"".join(self.stored),
        )


class BlockLog:
    """Of one shard. Ids begin at 1 and rise by one; 0 stands for an empty cache."""

    def __init__(self, cache: PrefixCache, *, shard: int = 0, max_kept: int = MAX_KEPT) -> None:
        """`max_kept` batches, and at most `MAX_KEPT_HASHES` in them."""
        self._cache = cache
        self._shard = shard
        self._max_kept = max_kept
        self._kept: deque[_Batch] = deque()
        self._num_kept = 0  # hashes
        self.last_id = 0

    def collect(self) -> pb.BlockEvents | None:
        """What changed since the last call; None: nothing."""
        events = self._cache.drain_events()
        if not events:
            return None
        touched = dict.fromkeys(event.hash for event in events if event.kind is not EventKind.CLEARED)
        stored = [hash_ for hash_ in touched if self._cache.is_registered(hash_)]
        cleared = any(event.kind is EventKind.CLEARED for event in events)
        known = set(stored)
        removed = [] if cleared else [hash_ for hash_ in touched if hash_ not in known]
        self.last_id += 1
        batch = _Batch(self.last_id, cleared, removed, stored)
        self._keep(batch)
        return batch.wire(self._shard)

    def after(self, last_id: int) -> list[pb.BlockEvents]:
        """For an ingress that knows everything up to `last_id`: what it lacks, as of the last `collect`."""
        first_kept = self._kept[0].id if self._kept else self.last_id + 1
        if 0 < last_id <= self.last_id and last_id + 1 >= first_kept:
            known = _Batch(last_id, cleared=False, removed=(), stored=())
            missing = (each for each in self._kept if each.id > last_id)
            return [each.wire(self._shard) for each in (known, *missing)]
        return [self._dump()]

    def _dump(self) -> pb.BlockEvents:
        groups = range(len(self._cache.groups))
        hashes = dict.fromkeys(hash_ for group in groups for hash_ in self._cache.registered_hashes(group))
        stored = filter(self._cache.is_registered, hashes)
        return pb.BlockEvents(shard=self._shard, id=self.last_id, dump=True, stored=b"".join(stored))

    def _keep(self, batch: _Batch) -> None:
        self._kept.append(batch)
        self._num_kept += batch.num_hashes
        while len(self._kept) > self._max_kept or self._num_kept > MAX_KEPT_HASHES:
            self._num_kept -= self._kept.popleft().num_hashes

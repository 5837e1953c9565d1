"""Who may still touch a KV block from outside the engine: leases, reads in flight, quarantine clocks.

Pure bookkeeping. It runs on the engine thread only and takes no lock; every time is a monotonic reading in
seconds handed in by the caller. T is `late_read_s`: a sink throws away a read that took longer, so a block whose
reader went silent may be reused 2T later.

    source   lease ── release ─────────────> unpinned at once
               └──── end_session / expiry ─> held for 2T, then free
    sink     post ─── complete ────────────> unpinned at once
               └──── lose ─── land ────────> held until the transport reports after all, then free

The sink's blocks know no clock: a read over a cut link may go on when the cable is back, minutes later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple, Protocol

from cluster.request import RequestKey


class BlockRef(NamedTuple):
    """One block of one group."""

    group: int
    block: int


class BlockPins(Protocol):
    """What the ledger asks of a block manager. Refs may repeat: every mention counts."""

    def pin(self, refs: Sequence[BlockRef], /) -> list[int]:
        """One more reference each; returns the blocks' generations."""
        ...

    def unpin(self, refs: Sequence[BlockRef], /) -> None:
        """Takes back what `pin` gave."""
        ...

    def hold(self, refs: Sequence[BlockRef], /) -> None:
        """Another process may still read (source) or write (sink) the block: do not reuse it."""
        ...

    def unhold(self, refs: Sequence[BlockRef], /) -> None:
        """Takes back what `hold` gave."""
        ...


class Expired(NamedTuple):
    """What one tick ended."""

    leases: list[RequestKey]
    num_ripe_blocks: int  # mentions that left quarantine


class Quarantined(NamedTuple):
    """Mentions that went into quarantine, by what may still touch them: a reader, or a read of our own."""

    source: int
    sink: int


@dataclass(slots=True)
class _Lease:
    session: str
    granted: float
    generations: dict[BlockRef, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Session:
    renewed: float
    keys: set[RequestKey] = field(default_factory=set)


class Ledger:
    """Owns every reference that a remote reader or a posted read has on a block. Engine thread only."""

    def __init__(self, pins: BlockPins, *, lease_s: float, late_read_s: float) -> None:
        if lease_s <= 0 or late_read_s <= 0:
            raise ValueError(f"lease_s={lease_s} and late_read_s={late_read_s} must be positive seconds")
        self._pins = pins
        self._lease_s = lease_s
        self._quarantine_s = 2 * late_read_s
        self._leases: dict[RequestKey, _Lease] = {}
        self._sessions: dict[str, _Session] = {}
        self._due: list[tuple[float, RequestKey]] = []  # heap; entries may be early or stale, checked when they surface
        self._posted: dict[int, tuple[BlockRef, ...]] = {}
        self._lost: dict[int, tuple[BlockRef, ...]] = {}  # given up, and may still be written
        self._quarantine: deque[tuple[float, tuple[BlockRef, ...]]] = deque()  # in order: `now` never falls
        self._num_leased = 0
        self._num_quarantined = 0
        self._entered = Quarantined(0, 0)

    # ------------------------------------------------------------------ source

    def lease(self, key: RequestKey, session: str, refs: Iterable[BlockRef], now: float) -> list[int]:
        """Adds blocks to the lease of `key` and restarts its clock; returns one generation per ref.

        A block that the lease already has is not counted twice. A key that comes over another session is a new
        lease: the reader behind the old session may still be reading, so its blocks go to quarantine.
        """
        lease = self._leases.get(key)
        if lease is not None and lease.session != session:
            self._quarantine_lease(key, now)
            lease = None
        if lease is None:
            lease = self._leases[key] = _Lease(session, now)
            self._sessions.setdefault(session, _Session(now)).keys.add(key)
            heappush(self._due, (now + self._lease_s, key))
        lease.granted = now
        wanted = list(refs)
        fresh = [ref for ref in dict.fromkeys(wanted) if ref not in lease.generations]
        lease.generations.update(zip(fresh, self._pins.pin(fresh), strict=True))
        self._num_leased += len(fresh)
        return [lease.generations[ref] for ref in wanted]

    def renew(self, session: str, now: float) -> None:
        """A sign of life from the reader: all its leases last `lease_s` from now on. Unknown sessions hold nothing."""
        if (entry := self._sessions.get(session)) is not None:
            entry.renewed = now

    def release(self, key: RequestKey) -> bool:
        """The reader is done: its references go at once. False if there was no such lease (idempotent)."""
        lease = self._drop_lease(key)
        if lease is None:
            return False
        self._pins.unpin(tuple(lease.generations))
        return True

    def end_session(self, session: str, now: float) -> list[RequestKey]:
        """The reader is gone or cut off: its leases end, their blocks stay untouched until now + 2T."""
        entry = self._sessions.get(session)
        keys = sorted(entry.keys) if entry else []
        for key in keys:
            self._quarantine_lease(key, now)
        return keys

    def has_lease(self, key: RequestKey) -> bool:
        return key in self._leases

    # ------------------------------------------------------------------ sink

    def post(self, pull_id: int, refs: Iterable[BlockRef], now: float) -> None:
        """A read into these blocks is about to be posted: they belong to the transport too, until it reports."""
        assert pull_id not in self._posted, f"pull {pull_id} posted twice"
        blocks = tuple(refs)
        self._pins.pin(blocks)
        self._posted[pull_id] = blocks

    def complete(self, pull_id: int) -> bool:
        """The transport reported completion or an error. False if it is not in flight (never posted, or lost)."""
        blocks = self._posted.pop(pull_id, None)
        if blocks is None:
            return False
        self._pins.unpin(blocks)
        return True

    def lose(self, pull_id: int) -> bool:
        """The transport has not reported and nobody waits for it any more: the blocks stay untouched until `land`.
        False as in `complete`."""
        blocks = self._posted.pop(pull_id, None)
        if blocks is None:
            return False
        self._hold(blocks)
        self._lost[pull_id] = blocks
        self._entered = self._entered._replace(sink=self._entered.sink + len(blocks))
        return True

    def land(self, pull_id: int) -> bool:
        """The transport reported on a lost read: nothing writes there any more. False if it was not lost."""
        blocks = self._lost.pop(pull_id, None)
        if blocks is None:
            return False
        self._pins.unhold(blocks)
        self._num_quarantined -= len(blocks)
        return True

    # ------------------------------------------------------------------ clocks

    def tick(self, now: float) -> Expired:
        """Ends leases that ran out and quarantines that are over. Cheap when nothing is due."""
        expired: list[RequestKey] = []
        while self._due and self._due[0][0] <= now:
            key = heappop(self._due)[1]
            deadline = self._deadline(key)
            if deadline is None:
                continue
            if deadline > now:
                heappush(self._due, (deadline, key))
                continue
            self._quarantine_lease(key, now)
            expired.append(key)
        num_ripe = 0
        while self._quarantine and self._quarantine[0][0] <= now:
            blocks = self._quarantine.popleft()[1]
            self._pins.unhold(blocks)
            num_ripe += len(blocks)
        self._num_quarantined -= num_ripe
        return Expired(expired, num_ripe)

    def next_deadline(self) -> float | None:
        """When `tick` may next have something to do; never later than that, None when nothing is pending."""
        times = [queue[0][0] for queue in (self._due, self._quarantine) if queue]
        return min(times, default=None)

    # ------------------------------------------------------------------ counts

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    @property
    def num_leased_blocks(self) -> int:
        """Mentions: a block leased to two readers counts twice."""
        return self._num_leased

    @property
    def num_posted(self) -> int:
        """Reads in flight."""
        return len(self._posted)

    @property
    def num_quarantined(self) -> int:
        """Mentions in quarantine: a block held twice counts twice."""
        return self._num_quarantined

    def take_quarantined(self) -> Quarantined:
        """What went into quarantine since this was last asked."""
        entered, self._entered = self._entered, Quarantined(0, 0)
        return entered

    def check_integrity(self) -> None:
        """Asserts that the indexes agree. O(everything): for tests and debugging."""
        by_session = {(name, key) for name, entry in self._sessions.items() for key in entry.keys}
        assert by_session == {(lease.session, key) for key, lease in self._leases.items()}, "sessions and leases differ"
        assert all(entry.keys for entry in self._sessions.values()), "a session without leases is kept"
        assert self._num_leased == sum(len(lease.generations) for lease in self._leases.values()), "leased blocks"
        held = [*(blocks for _, blocks in self._quarantine), *self._lost.values()]
        assert self._num_quarantined == sum(map(len, held)), "quarantined blocks"
        times = [time for time, _ in self._quarantine]
        assert times == sorted(times), "quarantine out of order: `now` fell"
        queued = {key: time for time, key in sorted(self._due, reverse=True)}
        for key in self._leases:
            deadline = self._deadline(key)
            assert deadline is not None and queued[key] <= deadline, f"lease {key} would be missed"

    def _deadline(self, key: RequestKey) -> float | None:
        lease = self._leases.get(key)
        if lease is None:
            return None
        return max(lease.granted, self._sessions[lease.session].renewed) + self._lease_s

    def _drop_lease(self, key: RequestKey) -> _Lease | None:
        lease = self._leases.pop(key, None)
        if lease is not None:
            entry = self._sessions[lease.session]
            entry.keys.discard(key)
            if not entry.keys:
                del self._sessions[lease.session]
            self._num_leased -= len(lease.generations)
        return lease

    def _quarantine_lease(self, key: RequestKey, now: float) -> None:
        lease = self._drop_lease(key)
        assert lease is not None, f"no lease of {key}"
        self._quarantine_blocks(tuple(lease.generations), now)
        self._entered = self._entered._replace(source=self._entered.source + len(lease.generations))

    def _quarantine_blocks(self, blocks: tuple[BlockRef, ...], now: float) -> None:
        self._hold(blocks)
        self._quarantine.append((now + self._quarantine_s, blocks))

    def _hold(self, blocks: tuple[BlockRef, ...]) -> None:
        # Held before unpinned: a block without references and holds could be handed out in between.
        self._pins.hold(blocks)
        self._pins.unpin(blocks)
        self._num_quarantined += len(blocks)

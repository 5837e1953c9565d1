"""The block events of all workers, in order and each once, into the prefix index.

    opened ──BlockQuery(last id known)──▶ asked ──that id, the next one, or a dump──▶ WHOLE
                                           ▲                                          │ an id is missing, or the
                                           └──────────────────────────────────────────┘ worker reports a later one

Ids that are known are ignored. A broken session keeps what is known, since its worker may be back: it is not routed to
meanwhile. A worker that is a member no more is forgotten at once. What a long batch holds is indexed in slices, between
which the loop does other things.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from cluster.log import Log
from cluster.membership import Member
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.session import Session
from router.holder_table import Keys
from router.predicted import Predicted
from router.prefix_index import PrefixIndex, keys_of

ASK_AGAIN_S: Final = 1.0  # an answer may be lost where the worker's bulk outbox is full
_SLICE: Final = 1024  # keys

ShardKey = tuple[str, int]  # incarnation, shard


@dataclass(slots=True)
class _Stream:
    name: str
    seat: int
    session: Session | None = None
    last_id: int = 0
    whole: bool = False
    asked_at: float = 0.0
    heard_at: float = 0.0


class _Slice(NamedTuple):
    seat: int
    stores: bool
    keys: Keys


class BlockFeed:
    """The router's loop only. `later` calls something on that loop after what waits there."""

    def __init__(self, metrics: Metrics, log: Log, later: Callable[[Callable[[], None]], object]) -> None:
        self.index = PrefixIndex()
        self.predicted = Predicted()
        self._metrics = metrics
        self._log = log
        self._later = later
        self._streams: dict[ShardKey, _Stream] = {}
        self._backlog: deque[_Slice] = deque()
        self.generation = 0  # of seats: rises when a worker gets another one

    def seat(self, incarnation: str, shard: int) -> int:
        """Its bit in the index; -1: nothing is known of it."""
        stream = self._streams.get((incarnation, shard))
        return -1 if stream is None else stream.seat

    @property
    def behind(self) -> bool:
        """Whether something that was heard is not indexed yet."""
        return bool(self._backlog)

    # ------------------------------------------------------------ workers come and go

    def opened(self, session: Session, member: Member, now: float) -> None:
        """Subscribes, from where the last session ended."""
        for shard in {rank.shard for rank in member.ranks}:
            key = member.incarnation, shard
            if key not in self._streams:
                self._streams[key] = _Stream(member.name, self.index.open_seat())
                self.generation += 1
            stream = self._streams[key]
            stream.session = session
            self._metrics.event_lag.labels(stream.name).set(0)
            self._set_whole(stream, False)
            self._ask(stream, shard, now)

    def broken(self, session: Session) -> None:
        for stream in self._streams.values():
            if stream.session is session:
                stream.session = None
                self._set_whole(stream, False)

    def gone(self, incarnation: str) -> None:
        """All that it held vanishes."""
        for key in [key for key in self._streams if key[0] == incarnation]:
            stream = self._streams.pop(key)
            self._retire(stream.seat)
            if all(other.name != stream.name for other in self._streams.values()):  # no successor under its name
                for gauge in (self._metrics.event_stream_alive, self._metrics.event_lag):
                    gauge.remove(stream.name)

    # ------------------------------------------------------------ what workers say

    def heard(self, session: Session, events: pb.BlockEvents, now: float) -> None:
        """Raises ValueError for hashes that are none."""
        stream = self._stream(session, events.shard)
        if stream is None:
            return
        if events.dump:
            self._load(stream, events, now)
        elif events.id == stream.last_id + 1:
            removed, stored = keys_of(events.removed), keys_of(events.stored)
            if events.cleared:
                self._renew(stream)
            self._put(stream, removed, stores=False)
            self._put(stream, stored, stores=True)
            self._follow(stream, events.id, now)
        elif events.id == stream.last_id:
            self._follow(stream, events.id, now)
        elif events.id > stream.last_id and stream.whole:
            self._metrics.event_gaps.inc()
            self._set_whole(stream, False)
            self._ask(stream, events.shard, now)

    def reported(self, session: Session, report: pb.LoadReport, now: float) -> None:
        """The worker's last id: it may be past what was lost on the way."""
        stream = self._stream(session, report.shard)
        if stream is None:
            return
        lag = max(0, report.last_event_id - stream.last_id)
        self._metrics.event_lag.labels(stream.name).set(lag)
        waited = now - max(stream.asked_at, stream.heard_at)
        if (lag or not stream.whole) and waited > ASK_AGAIN_S:
            self._metrics.event_gaps.inc()
            self._set_whole(stream, False)
            self._ask(stream, report.shard, now)

    def _stream(self, session: Session, shard: int) -> _Stream | None:
        stream = self._streams.get((session.peer.incarnation, shard))
        return stream if stream is not None and stream.session is session else None

    def _load(self, stream: _Stream, dump: pb.BlockEvents, now: float) -> None:
        """Everything, as of an id. Of an older one than is known, it is ignored."""
        if dump.id < stream.last_id:
            return
        keys = keys_of(dump.stored)
        self._log.debug("index dump", worker=stream.name, num_blocks=len(keys))
        if self._backlog or self.index.num_held(stream.seat):  # else it goes on in its seat: fewer words to look at
            self._renew(stream)
        self._put(stream, keys, stores=True)
        self._follow(stream, dump.id, now)

    def _follow(self, stream: _Stream, last_id: int, now: float) -> None:
        stream.last_id = last_id
        stream.heard_at = now
        self._set_whole(stream, True)

    def _ask(self, stream: _Stream, shard: int, now: float) -> None:
        assert stream.session is not None
        stream.asked_at = now
        stream.session.send(pb.Frame(block_query=pb.BlockQuery(shard=shard, last_id=stream.last_id)))

    def _set_whole(self, stream: _Stream, whole: bool) -> None:
        stream.whole = whole
        self._metrics.event_stream_alive.labels(stream.name).set(whole)

    # ------------------------------------------------------------ into the index

    def _renew(self, stream: _Stream) -> None:
        self._retire(stream.seat)
        stream.seat = self.index.open_seat()

    def _retire(self, seat: int) -> None:
        self.generation += 1
        self.index.retire_seat(seat)
        self.predicted.forget(seat)
        self._backlog = deque(each for each in self._backlog if each.seat != seat)
        self._metrics.indexed_blocks.set(self.index.num_blocks)

    def _put(self, stream: _Stream, keys: Keys, *, stores: bool) -> None:
        """Now, if it is short and nothing waits before it."""
        idle = not self._backlog
        self._backlog.extend(
            _Slice(stream.seat, stores, keys[first : first + _SLICE]) for first in range(0, len(keys), _SLICE)
        )
        if idle and self._backlog:
            self._index_one()

    def _index_one(self) -> None:
        if self._backlog:
            seat, stores, keys = self._backlog.popleft()
            (self.index.store if stores else self.index.remove)(seat, keys)
        if self._backlog:
            self._later(self._index_one)
        else:
            self._metrics.indexed_blocks.set(self.index.num_blocks)

"""Who hears of changes in this worker's prefix cache, and when."""

from __future__ import annotations

from cluster.parts import BLOCKS_TOPIC
from cluster.protos import worker_pb2 as pb
from cluster.session import Session
from workers.block_log import BlockLog, PrefixCache

PUBLISH_S = 0.05  # between two batches of block events


class BlockSubscribers:
    """Engine thread only."""

    def __init__(self, cache: PrefixCache) -> None:
        self._log = BlockLog(cache)
        self._sessions: set[Session] = set()
        self._published_at = 0.0

    @property
    def last_id(self) -> int:
        return self._log.last_id

    def tick(self, now: float) -> None:
        if now - self._published_at >= PUBLISH_S:
            self._publish(now)

    def subscribe(self, session: Session, query: pb.BlockQuery, now: float) -> None:
        """Raises ValueError for a shard that is not here."""
        if query.shard:
            raise ValueError(f"there is no shard {query.shard} here")
        self._publish(now)  # what is answered, others hear as the next batch
        for events in self._log.after(query.last_id):
            session.send_bulk(BLOCKS_TOPIC, events.SerializeToString())
        self._sessions.add(session)

    def leave(self, session: Session) -> None:
        self._sessions.discard(session)

    def _publish(self, now: float) -> None:
        """What changed, to those that asked for it. A batch that does not fit is asked for."""
        self._published_at = now
        events = self._log.collect()
        if events is not None:
            payload = events.SerializeToString()
            for session in self._sessions:
                session.send_bulk(BLOCKS_TOPIC, payload)

"""The source's half of the planner: what has been promised to which reader. Engine thread, no bytes, no ranks."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.request import RequestKey
from kvtransfer.ledger import BlockRef, Expired, Ledger
from kvtransfer.pull import BlockRun, BlockSpan


class Source:
    """Shares the ledger with the sink of the same worker: quarantine is one clock. `now` is monotonic seconds."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def publish(self, key: RequestKey, session: str, spans: Iterable[BlockSpan], now: float) -> tuple[BlockRun, ...]:
        """Leases written blocks to the reader behind `session`; the runs belong into the next ticket.

        Call it when the chunk's step is over, not when it was launched. Blocks leased before are not counted twice.
        """
        wanted = tuple(spans)
        refs = [BlockRef(span.group, block) for span in wanted for block in span.blocks]
        generations = iter(self._ledger.lease(key, session, refs, now))
        return tuple(BlockRun(span, tuple(next(generations) for _ in span.blocks)) for span in wanted)

    def renew(self, session: str, now: float) -> None:
        """On each heartbeat of the reader."""
        self._ledger.renew(session, now)

    def release(self, key: RequestKey) -> bool:
        """The reader has what it wants. False when nothing was leased (any more): releases may come twice."""
        return self._ledger.release(key)

    def end_session(self, session: str, now: float) -> list[RequestKey]:
        """The reader went silent, maybe in the middle of a read: its blocks rest for 2T. Returns its requests."""
        return self._ledger.end_session(session, now)

    def tick(self, now: float) -> Expired:
        """Ends what ran out, on both halves of the planner: call it once per step and when idle."""
        return self._ledger.tick(now)

"""Reads of KV blocks, from the ticket that allows one to the report of its end, whoever asked for the blocks.

Engine thread only; the bytes threads read.
"""

from __future__ import annotations

from cluster.errors import TransferError
from cluster.metrics import Metrics, PullOutcome
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.session import Session
from kvtransfer.connector import BlockRun, Done, PullResult
from workers.assembly import Assembly
from workers.fetch import Fetch
from workers.pairs import Pairs


class Reads:
    """Counts reads under the names of their sources, which they outlive: a session may break before a read ends."""

    def __init__(self, parts: Assembly, pairs: Pairs, metrics: Metrics) -> None:
        self._sink = parts.sink
        self._executors = parts.executors
        self._pairs = pairs
        self._metrics = metrics
        self._sources: dict[int, str] = {}  # names, by pull

    def begin(self, key: RequestKey, fetch: Fetch, session: Session, ticket: pb.Ticket, now: float) -> bool:
        """Reads the blocks of a ticket; False: they are not what was asked for, and the source is given up."""
        if not ticket.runs:
            return True
        try:
            runs = [BlockRun.of(run) for run in ticket.runs]
            raises = fetch.take_raises()
            pull = self._sink.plan(key, session.peer.incarnation, runs, fetch.wanted(), raises, now)
        except (TransferError, ValueError) as error:
            fetch.lose(str(error), now, died=False)
            return False
        fetch.begin_read(pull.id, now)
        self._sources[pull.id] = session.peer.name
        for executor in self._executors:
            executor.submit(pull)
        return True

    def done(self, done: Done, now: float) -> PullResult | None:
        """One rank is through with a read; the result when all are."""
        result = self._sink.done(done, now)
        if result is None:
            return None
        self._pairs.read(result)
        metrics, labels = self._metrics, (result.transport, self._sources.pop(result.pull.id))
        metrics.pulls.labels(PullOutcome(result.outcome)).inc()
        metrics.pulled_blocks.inc(len(result.valid_pairs))
        metrics.transfer_bytes.labels(*labels).inc(result.num_bytes)
        metrics.transfer_seconds.labels(*labels).observe(result.seconds)
        return result

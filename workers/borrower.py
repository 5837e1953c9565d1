"""Fetches the first blocks of a prompt from a worker that holds them, before the rest of it is computed here.

    begin ──reserved, holder asked──▶ pulling ──every block came──▶ the engine computes what follows them
      │ no pair, no room, cached here    │ refused, gone, silent, reads failed: from the blocks that came on
      ▼                                  ▼
    False: the caller gives the sequence to the engine, as if there were no holder

What goes wrong costs a recompute and nothing else. A holder answers at once or not at all, so nobody waits for a
reservation of somebody else. Engine thread only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cluster.errors import RequestError
from cluster.metrics import FetchOutcome, Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.session import Session
from kvtransfer.connector import BlockSpan, Outcome, PullResult
from workers.assembly import Assembly
from workers.engine.sequence import Sequence
from workers.fetch import Fetch, Lingering
from workers.pairs import Pairs
from workers.reads import Reads

ANSWER_S: Final = 0.5  # a holder that has not answered by then is busy: computing may well be faster


@dataclass(slots=True, eq=False)
class _Loan:
    key: RequestKey  # of this ask alone: the holder may be asked about the same request by others
    sequence: Sequence
    first_block: int
    fetch: Fetch
    holder: pb.WorkerRef
    num_bytes: int = 0


class Borrower:
    """For the stages that compute prompts. `me` is this worker's incarnation."""

    def __init__(self, parts: Assembly, pairs: Pairs, reads: Reads, metrics: Metrics, me: str) -> None:
        self._scheduler = parts.scheduler
        self._blocks = parts.blocks
        self._block_size = parts.block_size
        self._pairs = pairs
        self._reads = reads
        self._metrics = metrics
        self._me = me
        self._numbers: Iterator[int] = itertools.count(1)
        self._loans: dict[RequestKey, _Loan] = {}
        self._by_sequence: dict[int, _Loan] = {}
        self._fetched: dict[int, pb.Fetched] = {}  # of sequences that have not left
        self._lingering = Lingering()

    @property
    def num_open(self) -> int:
        """Fetches that nobody waits for any more included."""
        return len(self._loans) + len(self._lingering)

    # ------------------------------------------------------------------ for the stages

    def begin(self, sequence: Sequence, holding: pb.Holding, now: float) -> bool:
        """WAITING: whether its first blocks are on their way here; it joins the engine by itself then. Otherwise it is
        as it was, and the caller's to add."""
        if not holding.holder.incarnation:
            return False
        end = min(holding.num_blocks, len(sequence.hashes), (len(sequence.tokens) - 1) // self._block_size)
        session = self._pairs.warm(holding.holder.incarnation)
        reservation = None
        params = sequence.params
        if params.needs_whole_prompt or params.pooling is not None or self._num_held(sequence, end) >= end:
            outcome = FetchOutcome.UNNEEDED
        elif session is None:
            outcome = FetchOutcome.NO_PAIR
        else:
            outcome = FetchOutcome.NO_ROOM
            try:
                reservation = self._scheduler.reserve_for_pull(sequence)
            except RequestError:  # too long for a reservation; what it is too long for beside that, `add` says
                reservation = None
        if session is None or reservation is None:
            self._metrics.fetches.labels(outcome).inc()
            return False
        first = reservation.first_block
        destinations = tuple(
            BlockSpan(group, first, blocks[: end - first])
            for group, blocks in enumerate(reservation.destination)
            if sequence.grows(group)
        )
        fetch = Fetch(end * self._block_size, destinations, reservation.raises)
        key = RequestKey(f"{sequence.key.request_id}@{self._me}.{next(self._numbers)}", sequence.key.attempt)
        loan = _Loan(key, sequence, first, fetch, holding.holder)
        self._loans[key] = self._by_sequence[sequence.id] = loan
        fetch.begin(session, 0, now)
        hashes = b"".join(sequence.hashes[first:end])
        session.send(pb.Frame(held_request=pb.HeldRequest(key=key.wire(), first_block=first, block_hashes=hashes)), key)
        return True

    def leave(self, sequence: Sequence) -> pb.Fetched | None:
        """The stage is through with the sequence, before it ends it: what was fetched for it. A fetch under way is
        given up."""
        loan = self._by_sequence.get(sequence.id)
        if loan is not None:
            self._metrics.fetches.labels(FetchOutcome.CANCELLED).inc()
            self._return(loan)
        return self._fetched.pop(sequence.id, None)

    def _num_held(self, sequence: Sequence, end: int) -> int:
        """Blocks that a lookup finds here."""
        growing = (group for group in range(len(self._blocks.groups)) if sequence.grows(group))
        return min(len(self._blocks.lookup(group, sequence.hashes, end)) for group in growing)

    # ------------------------------------------------------------------ from holders

    def ticket(self, session: Session, ticket: pb.Ticket, now: float) -> bool:
        """Whether it is an answer to an ask from here."""
        loan = self._loan(session, ticket.key)
        if loan is None:
            return False
        loan.fetch.had_ticket = loan.fetch.last_ticket = True
        self._reads.begin(loan.key, loan.fetch, session, ticket, now)
        self._advance(loan, now)
        return True

    def kv_failed(self, session: Session, failed: pb.KvFailed, now: float) -> bool:
        """As `ticket`."""
        loan = self._loan(session, failed.key)
        if loan is None:
            return False
        loan.fetch.lose(failed.failure.message, now, died=False)
        self._advance(loan, now)
        return True

    def pulled(self, result: PullResult, now: float) -> bool:
        """A read is over; whether it was one of those here."""
        loan = self._loans.get(result.key)
        if loan is None or result.pull.id not in loan.fetch.in_flight:
            return self._lingering.ended(result.key, result.pull.id)
        fetch = loan.fetch
        fetch.landed(result.valid_pairs)
        loan.num_bytes += result.num_bytes
        fetch.end_read(result.pull.id, now)
        if result.outcome is not Outcome.OK:
            fetch.lose(f"{result.outcome}", now, died=False)
            fetch.blocks_stuck |= result.outcome is Outcome.STUCK
        self._advance(loan, now)
        return True

    def session_broken(self, session: Session, now: float) -> None:
        for loan in [each for each in self._loans.values() if each.fetch.session is session]:
            loan.fetch.lose(str(session.error), now, died=True)
            self._advance(loan, now)

    def tick(self, now: float) -> None:
        """Gives up holders that say nothing, and reads that never end."""
        for loan in list(self._loans.values()):
            fetch = loan.fetch
            if fetch.is_silent(now):
                fetch.give_up_reads()
            elif not fetch.had_ticket and now - fetch.asked_at > ANSWER_S:
                fetch.lose(f"no answer within {ANSWER_S:g} s", now, died=False)
            self._advance(loan, now)

    def _loan(self, session: Session, key: pb.RequestKey) -> _Loan | None:
        loan = self._loans.get(RequestKey.of(key))
        if loan is None or loan.fetch.session is not session or loan.fetch.source_lost or loan.fetch.had_ticket:
            return None
        return loan

    # ------------------------------------------------------------------ the end of a fetch

    def _advance(self, loan: _Loan, now: float) -> None:
        """Reads in flight decide first; then the engine goes on from the blocks that have come."""
        fetch, sequence = loan.fetch, loan.sequence
        if fetch.in_flight or not (fetch.last_ticket or fetch.source_lost):
            return
        self._return(loan)
        num_blocks = 0 if fetch.blocks_stuck else fetch.valid_blocks() - loan.first_block
        wanted = fetch.num_tokens // self._block_size - loan.first_block
        outcome = FetchOutcome.OK if num_blocks == wanted else FetchOutcome.LOST
        if fetch.last_ticket and not fetch.source_lost and num_blocks < wanted:
            outcome = FetchOutcome.PARTIAL
        elif not fetch.had_ticket:
            outcome = FetchOutcome.REFUSED
        self._metrics.fetches.labels(outcome).inc()
        self._metrics.fetched_tokens.inc(num_blocks * self._block_size)
        told = self._fetched.setdefault(sequence.id, pb.Fetched())
        told.holder.CopyFrom(loan.holder)
        told.blocks += num_blocks
        told.tokens += num_blocks * self._block_size
        told.bytes += loan.num_bytes
        told.seconds += now - fetch.asked_at
        if fetch.blocks_stuck:
            self._scheduler.release_pull(sequence)
            self._scheduler.add(sequence)
        else:
            self._scheduler.pull_done(sequence, (loan.first_block + num_blocks) * self._block_size)

    def _return(self, loan: _Loan) -> None:
        """Nothing more is wanted of the holder. While reads are in flight the release waits for them."""
        del self._loans[loan.key], self._by_sequence[loan.sequence.id]
        session, fetch = loan.fetch.session, loan.fetch
        assert session is not None
        if fetch.in_flight:
            self._lingering.add(loan.key, session, fetch.ask, fetch.in_flight)
        else:
            session.send(pb.Frame(release=pb.Release(key=loan.key.wire(), ask=fetch.ask)))

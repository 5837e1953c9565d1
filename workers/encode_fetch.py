"""Brings the output of an encoder here before a sequence computes or pulls its decoder prompt.

    begin ──an encoder is asked──▶ awaited ──every block came──▶ the stage goes on with the sequence
      │ nothing to encode,            │ refused, gone, silent, read failed: the next encoder is asked,
      │ cached, or planned here       │ at last our own one where the plan allows it
      ▼                               ▼
    False: the stage goes on at once, and the engine reads the input if it must

A sequence that waits here holds no blocks but those for the output. Of sequences with equal inputs one fetches, and the
others find what it brought. Two encoders that died of one input are not followed by a third. Engine thread only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from cluster.config import SchedulerConfig
from cluster.errors import NoWorker, RequestError, RequestTooLong, SourcesLost, from_failure
from cluster.hidden_states import HiddenStates
from cluster.metrics import FetchOutcome, Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import Pooling, RequestKey
from cluster.session import Session
from kvtransfer.connector import BlockSpan, Outcome, PullResult
from workers.assembly import Assembly
from workers.engine.pulls import PullReservation
from workers.engine.sequence import Sequence as TokenStream
from workers.fetch import Fetch, Lingering
from workers.pairs import Pairs
from workers.reads import Reads

MAX_DEATHS = 2  # of encoders, under one input
_NO_BLOCKS = PullReservation(0, 0, (), ())
RETRY_S = 0.05  # before encoders that were busy, or a full pool, are tried again

Then: TypeAlias = Callable[[RequestError | None, float], None]


@dataclass(slots=True, eq=False)
class _Wait:
    sequence: TokenStream
    encoders: Sequence[pb.WorkerRef]
    may_read: bool  # here
    deadline: float | None
    then: Then
    since: float
    told: pb.Encoded
    tried: set[str] = field(default_factory=set)  # incarnations
    key: RequestKey | None = None  # of the ask that is open
    fetch: Fetch | None = None
    not_before: float = 0.0
    num_deaths: int = 0
    vector: bytes = b""  # what its encoder told of the output, where the sequence is pooled: no block is fetched then


class OutputFetches:
    """For the stages that run decoders. `me` is this worker."""

    def __init__(
        self, parts: Assembly, pairs: Pairs, reads: Reads, metrics: Metrics, limits: SchedulerConfig, me: pb.WorkerRef
    ) -> None:
        self._scheduler = parts.scheduler
        self._pairs = pairs
        self._reads = reads
        self._metrics = metrics
        self._limits = limits
        self._me = me
        self._numbers: Iterator[int] = itertools.count(1)
        self._waits: dict[int, _Wait] = {}  # by sequence
        self._asks: dict[RequestKey, _Wait] = {}
        self._told: dict[int, pb.Encoded] = {}  # of sequences that have not left
        self._vectors: dict[int, bytes] = {}
        self._lingering = Lingering()

    @property
    def num_open(self) -> int:
        """Fetches that nobody waits for any more included."""
        return len(self._waits) + len(self._lingering)

    # ------------------------------------------------------------------ for the stages

    def begin(
        self,
        sequence: TokenStream,
        encoders: Sequence[pb.WorkerRef],
        then: Then,
        now: float,
        *,
        may_read: bool,
        deadline: float | None,
    ) -> bool:
        """WAITING and parked: whether the stage has to wait until `then` is called, with the error that ends the
        sequence, or None. Raises RequestError. `may_read`: whether our own encoder may do it in the end; without
        `encoders` it does."""
        source = sequence.encoder_input
        if source is None:
            return False
        told = self._told.setdefault(sequence.id, pb.Encoded(tokens=len(source.tokens)))
        if not self._scheduler.lacks_output(sequence):
            return False
        if not encoders:
            told.encode.CopyFrom(self._me)
            return False
        wait = _Wait(sequence, encoders, may_read, deadline, then, now, told)
        if self._ask(wait, now):
            self._waits[sequence.id] = wait
            return True
        return False

    def told(self, sequence: TokenStream) -> pb.Encoded | None:
        """How its output came here so far; None: it needs none."""
        return self._told.get(sequence.id)

    def vector(self, sequence: TokenStream) -> bytes:
        """What was asked of its output, as another worker's encoder told it; empty: nothing yet."""
        return self._vectors.get(sequence.id, b"")

    def leave(self, sequence: TokenStream) -> pb.Encoded | None:
        """The stage is through with the sequence, before it ends it: how its output came here."""
        self._vectors.pop(sequence.id, None)
        wait = self._waits.pop(sequence.id, None)
        if wait is not None:
            self._metrics.outputs.labels(FetchOutcome.CANCELLED).inc()
            self._leave_encoder(wait)
        return self._told.pop(sequence.id, None)

    # ------------------------------------------------------------------ from encoders

    def ticket(self, session: Session, ticket: pb.Ticket, now: float) -> bool:
        """Whether it is an answer to an ask from here."""
        wait = self._asked(session, ticket.key)
        if wait is None or wait.key is None or wait.fetch is None:
            return False
        wait.fetch.had_ticket = wait.fetch.last_ticket = True
        pooling = wait.sequence.params.pooling
        if pooling is not Pooling.STATES:
            wait.vector = ticket.handoff.embedding
        if pooling not in (None, Pooling.STATES) and not wait.vector:
            wait.fetch.lose("it left out what was asked of the output", now, died=False)
        self._reads.begin(wait.key, wait.fetch, session, ticket, now)
        self._advance(wait, now)
        return True

    def states(self, session: Session, key: RequestKey, states: HiddenStates, now: float) -> None:
        """They belong to a ticket, whichever comes first; what nobody waits for is dropped."""
        wait = self._asks.get(key)
        fetch = None if wait is None else wait.fetch
        if wait is None or fetch is None or fetch.session is not session or fetch.source_lost:
            return
        source = wait.sequence.encoder_input
        assert source is not None
        if wait.sequence.params.pooling is not Pooling.STATES or states.num_tokens != len(source.tokens):
            fetch.lose(f"it sent hidden states of {states.num_tokens} tokens, which nobody asked for", now, died=False)
        else:
            wait.vector = states.data
            wait.told.bytes += len(states.data)
        self._advance(wait, now)

    def kv_failed(self, session: Session, failed: pb.KvFailed, now: float) -> bool:
        """As `ticket`."""
        wait = self._asked(session, failed.key)
        if wait is None or wait.fetch is None:
            return False
        failure = failed.failure
        if failure.code in (pb.INVALID, pb.TOO_LONG, pb.DEADLINE):
            self._give_back(wait)
            self._end(wait, from_failure(failure), now)
            return True
        wait.fetch.lose(failure.message, now, died=failure.code == pb.INTERNAL)
        self._advance(wait, now)
        return True

    def pulled(self, result: PullResult, now: float) -> bool:
        """A read is over; whether it was one of those here."""
        wait = self._asks.get(result.key)
        fetch = None if wait is None else wait.fetch
        if wait is None or fetch is None or result.pull.id not in fetch.in_flight:
            return self._lingering.ended(result.key, result.pull.id)
        fetch.landed(result.valid_pairs)
        wait.told.blocks += len(result.valid_pairs)
        wait.told.bytes += result.num_bytes
        fetch.end_read(result.pull.id, now)
        if result.outcome is not Outcome.OK:
            fetch.lose(f"{result.outcome}", now, died=False)
            fetch.blocks_stuck |= result.outcome is Outcome.STUCK
        self._advance(wait, now)
        return True

    def session_broken(self, session: Session, now: float) -> None:
        for wait in [each for each in self._asks.values() if each.fetch and each.fetch.session is session]:
            assert wait.fetch is not None
            wait.fetch.lose(str(session.error), now, died=True)
            self._advance(wait, now)

    def tick(self, now: float) -> None:
        """Encoders that say nothing, reads that never end, and those that found no room or nobody to ask."""
        for wait in list(self._waits.values()):
            fetch = wait.fetch
            if fetch is None:
                if now >= wait.not_before:
                    self._go_on(wait, now)
                continue
            if fetch.is_silent(now):
                fetch.give_up_reads()
            elif not fetch.had_ticket and now - fetch.asked_at > self._limits.max_pull_wait_s:
                fetch.lose(f"no answer within {self._limits.max_pull_wait_s:g} s", now, died=False)
            self._advance(wait, now)

    # ------------------------------------------------------------------ one fetch

    def _asked(self, session: Session, key: pb.RequestKey) -> _Wait | None:
        wait = self._asks.get(RequestKey.of(key))
        fetch = None if wait is None else wait.fetch
        if fetch is None or fetch.session is not session or fetch.source_lost or fetch.had_ticket:
            return None
        return wait

    def _ask(self, wait: _Wait, now: float) -> bool:
        """Asks the next encoder, or waits for one. False: there is nothing to wait for. Raises RequestError."""
        sequence = wait.sequence
        source = sequence.encoder_input
        assert source is not None
        if not self._scheduler.lacks_output(sequence):  # somebody else brought it
            return False
        candidates = (self._pairs.warm(ref.incarnation) for ref in wait.encoders if ref.incarnation not in wait.tried)
        session = next((each for each in candidates if each is not None), None)
        if session is None:
            if wait.may_read:
                wait.told.encode.CopyFrom(self._me)
                self._metrics.outputs.labels(FetchOutcome.NO_PAIR).inc()
                return False
            if now - wait.since > self._limits.max_pull_wait_s:
                raise NoWorker("no encode worker is within reach; start one")
            wait.tried.clear()  # those tried may live, busy or after a mishap
            wait.not_before = now + RETRY_S
            return True
        try:
            reservation = _NO_BLOCKS if sequence.params.pooling else self._scheduler.reserve_output(sequence)
        except RequestTooLong:  # for a reservation, which may not fill the pool; not for reading it here
            if not wait.may_read:
                raise
            wait.told.encode.CopyFrom(self._me)
            self._metrics.outputs.labels(FetchOutcome.NO_ROOM).inc()
            return False
        if reservation is None:
            wait.not_before = now + RETRY_S
            return True
        destinations = tuple(
            BlockSpan(group, 0, blocks) for group, blocks in enumerate(reservation.destination) if blocks
        )
        fetch = wait.fetch = Fetch(len(source.tokens), destinations, reservation.raises)
        name = f"{sequence.key.request_id}@{self._me.incarnation}.e{next(self._numbers)}"
        key = wait.key = RequestKey(name, sequence.key.attempt)
        self._asks[key] = wait
        fetch.begin(session, 0, now)
        wait.tried.add(session.peer.incarnation)
        wait.told.encode.CopyFrom(pb.WorkerRef(name=session.peer.name, incarnation=session.peer.incarnation))
        ask = pb.EncodeRequest(
            key=key.wire(),
            token_ids=source.tokens,
            chain_root=source.root,
            priority=sequence.priority,
            deadline_ms=0 if wait.deadline is None else max(1, int((wait.deadline - now) * 1000)),
            pooling=pb.POOL_NONE if sequence.params.pooling is None else sequence.params.pooling.value,
        )
        session.send(pb.Frame(encode_request=ask), key)
        return True

    def _advance(self, wait: _Wait, now: float) -> None:
        """Reads in flight decide first."""
        fetch = wait.fetch
        if fetch is None or fetch.in_flight or not (fetch.last_ticket or fetch.source_lost):
            return
        if fetch.complete and not fetch.source_lost:
            if wait.sequence.params.pooling is Pooling.STATES and not wait.vector:
                return  # they are on the other stream
            self._leave_encoder(wait)
            if wait.vector:
                self._vectors[wait.sequence.id] = wait.vector
            else:
                self._scheduler.output_done(wait.sequence, is_here=True)
            self._metrics.outputs.labels(FetchOutcome.OK).inc()
            self._end(wait, None, now)
            self._wake(wait)
            return
        wait.num_deaths += fetch.under_it
        wait.told.lost += 1
        lost = fetch.had_ticket or fetch.under_it
        self._metrics.outputs.labels(FetchOutcome.LOST if lost else FetchOutcome.REFUSED).inc()
        self._give_back(wait)
        if wait.num_deaths >= MAX_DEATHS:
            told = f"{wait.num_deaths} encoders died or failed while they read the input of"
            last = f"{wait.sequence.key.request_id} (last: {fetch.source_lost})"
            self._end(wait, SourcesLost(f"{told} {last}"), now)
        else:
            self._go_on(wait, now)

    def _go_on(self, wait: _Wait, now: float) -> None:
        try:
            if self._ask(wait, now):
                return
        except RequestError as error:
            self._end(wait, error, now)
        else:
            self._end(wait, None, now)

    def _end(self, wait: _Wait, error: RequestError | None, now: float) -> None:
        wait.told.seconds = now - wait.since
        del self._waits[wait.sequence.id]
        wait.then(error, now)

    def _wake(self, done: _Wait) -> None:
        """Those with the same input find what it brought."""
        for wait in self._waits.values():
            if wait.fetch is None and wait.sequence.chain_root == done.sequence.chain_root:
                wait.not_before = 0.0

    def _give_back(self, wait: _Wait) -> None:
        self._leave_encoder(wait)
        wait.vector = b""
        if wait.sequence.params.pooling is None:
            self._scheduler.output_done(wait.sequence, is_here=False)

    def _leave_encoder(self, wait: _Wait) -> None:
        """Nothing more is wanted of it. While reads are in flight the release waits for them."""
        fetch, key, wait.fetch, wait.key = wait.fetch, wait.key, None, None
        if fetch is None or key is None:
            return
        del self._asks[key]
        session = fetch.session
        assert session is not None
        if not fetch.last_ticket:
            session.send(pb.Frame(cancel=pb.Cancel(key=key.wire(), reason="no longer wanted")))
        if fetch.in_flight:
            self._lingering.add(key, session, fetch.ask, fetch.in_flight)
        else:
            session.send(pb.Frame(release=pb.Release(key=key.wire(), ask=fetch.ask)))

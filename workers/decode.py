"""The decode stage: takes requests from ingresses, fetches the KV of their prompts, streams their tokens.

    submit ─▶ PENDING ──reserved, source asked──▶ PULLING ──every block came──▶ RUNNING ──▶ settled
                ▲ │ plan says local                 │ source gone, no other: the rest is computed here ▲
                │ └─────────────────────────────────┼──────────────────────────────────────────────────┘
                └── waited too long, or preempted ──┘

A request may end in any phase; `_settle` is the one way out. Its reads in flight keep their destination blocks (the
ledger's pins), and the source is told to release only when the last of them has ended. Engine thread only.
"""

from __future__ import annotations

from cluster.config import SchedulerConfig
from cluster.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    NoWorker,
    RequestError,
    RequestTooLong,
    TransferError,
    from_failure,
)
from cluster.metrics import DropReason, Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import FinishReason, RequestKey
from cluster.session import Session
from kvtransfer.connector import BlockRun, BlockSpan, Done, Outcome
from workers.assembly import Assembly
from workers.engine.sequence import Sequence
from workers.engine.step_plan import StepOutcome
from workers.fetch import Fetch, Lingering
from workers.pairs import Pairs
from workers.serving import Phase, Reads, Request, Tokens

RETRY_S = 0.05  # before a source that was busy, or a pool that was full, is asked again


class DecodeStage:
    """What a worker with the role `decode` does with the engine and the connector."""

    def __init__(
        self, parts: Assembly, pairs: Pairs, metrics: Metrics, limits: SchedulerConfig, me: pb.WorkerRef
    ) -> None:
        self._scheduler = parts.scheduler
        self._sink = parts.sink
        self._executors = parts.executors
        self._transport = parts.executors[0].transport_name
        self._next_id = parts.next_id
        self._block_size = parts.block_size
        self._pairs = pairs
        self._metrics = metrics
        self._limits = limits
        self._me = me
        self._requests: dict[RequestKey, Request] = {}
        self._by_sequence: dict[int, Request] = {}
        self._attempts: dict[str, RequestKey] = {}  # open request ids
        self._lingering = Lingering()
        self._reads = Reads(metrics, self._transport)
        self._tokens = Tokens(metrics)
        self.draining = False

    @property
    def num_open(self) -> int:
        return len(self._requests) + len(self._lingering)

    @property
    def num_pending(self) -> int:
        return sum(request.phase is Phase.PENDING for request in self._requests.values())

    # ------------------------------------------------------------------ from the ingress

    def submit(self, session: Session, submit: pb.Submit, now: float) -> None:
        key = RequestKey.of(submit.key)
        older = self._attempts.get(key.request_id)
        if older is not None and older.attempt >= key.attempt:
            self._metrics.dropped_frames.labels(DropReason.OLD_ATTEMPT).inc()
            return
        if older is not None:
            self._settle(self._requests[older], now, error=Cancelled(f"attempt {key.attempt} replaces this one"))
        request = Request.of(session, submit, self._me, self._next_id(), now)
        try:
            if self.draining:
                raise NoWorker(f"{self._me.name} is draining; try another worker")
            if self.num_pending + self._scheduler.num_waiting >= self._limits.max_waiting:
                raise Busy(f"{self._me.name} has {self._limits.max_waiting} requests waiting; retry later")
            self._scheduler.check(request.sequence)
        except RequestError as error:
            self._tokens.end(request, FinishReason.ERROR, error)
            return
        self._requests[key] = self._by_sequence[request.sequence.id] = request
        self._attempts[key.request_id] = key
        self._start(request, now)

    def cancel(self, session: Session, key: RequestKey, now: float) -> None:
        request = self._requests.get(key)
        if request is not None and request.session is session:
            self._settle(request, now, error=Cancelled("cancelled"))

    # ------------------------------------------------------------------ from sources

    def ticket(self, session: Session, ticket: pb.Ticket, now: float) -> None:
        """Blocks of a chunk are ready to be read, and with the last ones come the first tokens."""
        found = self._fetching(session, ticket.key, ticket.ask)
        if found is None:
            return
        request, fetch = found
        fetch.had_ticket = True
        fetch.last_ticket = ticket.last
        request.route.chunks += 1
        request.route.prefill.CopyFrom(pb.WorkerRef(name=session.peer.name, incarnation=session.peer.incarnation))
        request.route.prefill_pid = ticket.pid
        if ticket.runs:
            try:
                runs = [BlockRun.of(run) for run in ticket.runs]
                raises = fetch.take_raises()
                pull = self._sink.plan(request.key, session.peer.incarnation, runs, fetch.wanted(), raises, now)
            except (TransferError, ValueError) as error:
                fetch.lose(str(error), now, died=False)
                self._advance(request, now)
                return
            fetch.begin_read(pull.id, now)
            self._reads.posted(pull.id, session.peer.name)
            for executor in self._executors:
                executor.submit(pull)
        if ticket.last:
            request.route.prefill_prefix_hit_tokens = ticket.prefix_hit_tokens
            request.route.prefill_s += ticket.compute_s
            request.route.queue_s += ticket.queue_s
            self._hand_off(request, list(ticket.handoff.token_ids), now)
        if request.key in self._requests:
            self._advance(request, now)

    def kv_failed(self, session: Session, failed: pb.KvFailed, now: float) -> None:
        found = self._fetching(session, failed.key, failed.ask)
        if found is None:
            return
        request, fetch = found
        if failed.failure.code in (pb.INVALID, pb.TOO_LONG, pb.DEADLINE):
            self._settle(request, now, error=from_failure(failed.failure))
            return
        fetch.lose(failed.failure.message, now, died=failed.failure.code == pb.INTERNAL)
        self._advance(request, now)

    def pulled(self, done: Done, now: float) -> None:
        """One rank is through with one pull."""
        result = self._sink.done(done, now)
        if result is None:
            return
        self._reads.ended(result)
        request = self._requests.get(result.key)
        fetch = request.fetch if request is not None else None
        if request is None or fetch is None or result.pull.id not in fetch.in_flight:
            self._lingering.ended(result.key, result.pull.id)
            return
        fetch.landed(result.valid_pairs)
        request.route.blocks += len(result.valid_pairs)
        request.route.bytes += result.num_bytes
        request.route.transfer_s += fetch.end_read(result.pull.id, now)
        if result.outcome is not Outcome.OK:
            reason = f"{result.outcome}: {'; '.join(result.errors) or 'read thrown away'}"
            fetch.lose(reason, now, died=result.outcome is Outcome.LOST)
            fetch.blocks_stuck |= result.outcome is Outcome.STUCK
        self._advance(request, now)

    def session_broken(self, session: Session, now: float) -> None:
        """An ingress or a source is gone."""
        for request in list(self._requests.values()):
            if request.session is session:
                self._settle(request, now, error=Cancelled("the ingress is gone"))
            elif request.fetch is not None and request.fetch.session is session:
                request.fetch.lose(str(session.error), now, died=True)
                self._advance(request, now)
        self._tokens.forget(session)

    def overflow(self, key: RequestKey, now: float) -> None:
        if (request := self._requests.get(key)) is not None:
            self._metrics.overflows.inc()
            self._settle(request, now, error=Cancelled("the reader is too slow: its outbox is full"))

    # ------------------------------------------------------------------ the loop

    def tick(self, now: float) -> None:
        """Deadlines, waits, retries. O(open requests) at most every few milliseconds."""
        for request in list(self._requests.values()):
            if request.deadline is not None and request.deadline <= now:
                self._settle(request, now, error=DeadlineExceeded(f"the deadline of {request.key.request_id} passed"))
            elif request.phase is Phase.PULLING:
                self._check_wait(request, now)
        pending = [each for each in self._requests.values() if each.phase is Phase.PENDING and each.not_before <= now]
        for request in sorted(pending, key=lambda each: (-each.sequence.priority, each.sequence.arrival)):
            self._start(request, now)

    def settle(self, outcome: StepOutcome, now: float) -> None:
        """Tokens of a step go out, finished requests end, preempted ones ask a source again."""
        for row in (*outcome.chunks, *outcome.tokens):
            if (request := self._by_sequence.get(row.seq.id)) is not None:
                request.stepped(self._metrics, now)
        for emitted in outcome.tokens:
            request = self._by_sequence.get(emitted.seq.id)
            if request is None:
                continue
            self._tokens.add(request, emitted.first_token_index, [emitted.token])
            if emitted.finish is not None:
                self._settle(request, now, finish=emitted.finish)
        for sequence in outcome.preempted:
            request = self._by_sequence.get(sequence.id)
            if request is None:
                continue
            request.route.preemptions += 1
            if request.remote and (not request.local_allowed or self._pairs.pick(request.sources, ()) is not None):
                self._scheduler.park(sequence)
                request.pend(now, RETRY_S)

    def fail(self, sequence: Sequence, error: RequestError, now: float) -> None:
        """The step of this sequence failed."""
        if (request := self._by_sequence.get(sequence.id)) is not None:
            self._settle(request, now, error=error)

    def flush(self, step: int) -> None:
        """One frame per ingress with what this turn of the loop brought."""
        self._tokens.flush(step)

    # ------------------------------------------------------------------ fetching

    def _start(self, request: Request, now: float) -> None:
        """PENDING: finds a source and blocks, or computes here where the plan says so."""
        if request.phase is not Phase.PENDING:
            return
        if not request.remote:
            self._compute_here(request, "plan")
            return
        session = self._pairs.pick(request.sources, ())
        if session is None:
            if request.local_allowed:
                self._compute_here(request, "no_source")
            elif now - request.pending_since > self._limits.max_pull_wait_s:
                self._settle(request, now, error=NoWorker("no prefill worker is within reach; start one"))
            else:
                request.wait(now + RETRY_S)
            return
        try:
            reservation = self._scheduler.reserve_for_pull(request.sequence)
        except RequestTooLong as error:  # for a reservation, which may not fill the pool; not for computing here
            if request.local_allowed:
                self._compute_here(request, "too_long_to_pull")
            else:
                self._settle(request, now, error=error)
            return
        if reservation is None:
            request.wait(now + RETRY_S)
            return
        request.route.decode_prefix_hit_tokens = reservation.hit_tokens
        self._metrics.prefix_hit_tokens.labels("decode").inc(reservation.hit_tokens)
        self._metrics.prefix_lookup_tokens.labels("decode").inc(len(request.sequence.tokens))
        destinations = tuple(
            BlockSpan(group, reservation.first_block, blocks) for group, blocks in enumerate(reservation.destination)
        )
        request.fetch = Fetch(len(request.sequence.tokens), destinations, reservation.raises)
        request.phase = Phase.PULLING
        self._ask(request, session, now)

    def _ask(self, request: Request, session: Session, now: float) -> None:
        fetch, sequence = request.fetch, request.sequence
        assert fetch is not None
        request.num_asks += 1
        fetch.begin(session, request.num_asks, now)
        tokens = sequence.tokens[: fetch.num_tokens]
        num_full = len(tokens) // self._block_size
        frame = pb.KvRequest(
            key=request.key.wire(),
            token_ids=tokens,
            num_prompt_tokens=sequence.num_prompt,
            block_hashes=b"".join(sequence.hashes[:num_full]),
            first_block=fetch.valid_blocks(),
            sampling=sequence.params.wire(),
            priority=sequence.priority,
            deadline_ms=request.remaining_ms(now),
            ask=fetch.ask,
        )
        session.send(pb.Frame(kv_request=frame), request.key)

    def _fetching(self, session: Session, key: pb.RequestKey, ask: int) -> tuple[Request, Fetch] | None:
        """The request and its fetch that a source's frame is about; frames of other asks are dropped and counted."""
        request = self._requests.get(RequestKey.of(key))
        fetch = request.fetch if request is not None else None
        if request is None or fetch is None or fetch.session is not session or fetch.ask != ask or fetch.source_lost:
            self._metrics.dropped_frames.labels(DropReason.UNKNOWN_REQUEST).inc()
            return None
        return request, fetch

    def _hand_off(self, request: Request, tokens: list[int], now: float) -> None:
        """The source's first tokens: known input from here on, told at once, whatever the blocks do."""
        sequence, fetch = request.sequence, request.fetch
        assert fetch is not None
        for offset, token in enumerate(tokens):
            if fetch.num_tokens + offset < len(sequence.tokens):
                continue  # a second source drew it again: the same one
            index = len(sequence.tokens) - sequence.num_prompt
            finish = self._scheduler.append_token(sequence, token)
            self._tokens.add(request, index, [token])
            if finish is not None:
                self._settle(request, now, finish=finish)
                return

    def _advance(self, request: Request, now: float) -> None:
        """After anything that may have completed or failed a fetch; reads in flight decide first."""
        fetch = request.fetch
        if fetch is None or fetch.in_flight:
            return
        if fetch.source_lost:
            self._lose_source(request, fetch, now)
        elif fetch.complete:
            self._leave_source(request)
            request.fetch = None
            request.phase = Phase.RUNNING
            self._scheduler.pull_done(request.sequence, fetch.num_tokens)

    def _lose_source(self, request: Request, fetch: Fetch, now: float) -> None:
        """Another source, or our own engine, goes on from the blocks that have come."""
        self._leave_source(request)
        if (error := request.blame(fetch)) is not None:
            self._settle(request, now, error=error)
            return
        if fetch.blocks_stuck:
            self._requeue(request, now)
            return
        session = self._pairs.pick(request.sources, fetch.tried)
        if session is not None:
            self._metrics.spares_used.inc()
            request.route.spare_used += 1
            self._ask(request, session, now)
            return
        if not request.local_allowed:
            self._requeue(request, now)  # until one comes; those tried may live, busy or after a mishap
            return
        valid_tokens = min(fetch.valid_blocks() * self._block_size, fetch.num_tokens)
        request.fetch = None
        request.route.recomputed_tokens += fetch.num_tokens - valid_tokens
        self._metrics.local_prefills.labels("source_lost").inc()
        request.phase = Phase.RUNNING
        self._scheduler.pull_done(request.sequence, valid_tokens)

    def _check_wait(self, request: Request, now: float) -> None:
        """A reservation without a ticket for too long goes back, so that two full workers cannot wait for ever."""
        fetch = request.fetch
        assert fetch is not None
        if fetch.is_silent(now):
            fetch.give_up_reads()
            self._advance(request, now)
            return
        if fetch.had_ticket or fetch.source_lost or now - fetch.asked_at < self._limits.max_pull_wait_s:
            return
        self._requeue(request, now)

    def _requeue(self, request: Request, now: float) -> None:
        self._leave_source(request)
        self._scheduler.release_pull(request.sequence)
        request.fetch = None
        request.pend(now, RETRY_S)

    def _leave_source(self, request: Request) -> None:
        """Nothing more is wanted from the source. While reads are in flight the release waits for them."""
        fetch = request.fetch
        if fetch is None or fetch.session is None:
            return
        session, fetch.session = fetch.session, None
        key = request.key
        if not fetch.last_ticket:
            session.send(pb.Frame(cancel=pb.Cancel(key=key.wire(), reason="no longer wanted")))
        if fetch.in_flight:
            self._lingering.add(key, session, fetch.ask, fetch.in_flight)
        else:
            session.send(pb.Frame(release=pb.Release(key=key.wire(), ask=fetch.ask)))

    def _compute_here(self, request: Request, reason: str) -> None:
        self._metrics.local_prefills.labels(reason).inc()
        request.route.local_prefill = True
        request.phase = Phase.RUNNING
        self._scheduler.add(request.sequence)

    # ------------------------------------------------------------------ the end

    def _settle(
        self, request: Request, now: float, *, finish: FinishReason | None = None, error: RequestError | None = None
    ) -> None:
        """The one way out: blocks, source and ingress all hear of it."""
        del self._requests[request.key], self._by_sequence[request.sequence.id]
        del self._attempts[request.key.request_id]
        self._leave_source(request)
        self._scheduler.abort(request.sequence)
        if error is not None:
            finish = FinishReason.ERROR
        assert finish is not None
        if request.route.blocks:
            request.route.transport = self._transport
        self._tokens.end(request, finish, error)

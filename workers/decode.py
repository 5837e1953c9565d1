"""The decode stage: takes requests from ingresses, fetches the KV of their prompts, streams their tokens.

    submit ─▶ PENDING ◀──▶ ENCODING: the output of its encoder, if it has one, comes first

              PENDING ──reserved, source asked──▶ PULLING ──every block came──▶ RUNNING ──▶ settled
                ▲ │ plan says local                 │ source gone, no other: the rest is computed here ▲
                │ └─────────────────────────────────┼──────────────────────────────────────────────────┘
                └── waited too long, or preempted ──┘

A request may end in any phase; `_settle` is the one way out. Its reads in flight keep their destination blocks (the
ledger's pins), and the source is told to release only when the last of them has ended. What its source says of the
prompt beside its KV (logprobs, an embedding) is passed on as it comes. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from cluster.config import SchedulerConfig
from cluster.errors import Busy, Cancelled, DeadlineExceeded, Draining, RequestError, from_failure
from cluster.hashing import root_of
from cluster.metrics import DropReason, Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import FinishReason, Hypothesis, RequestKey
from cluster.session import Session
from kvtransfer.connector import PullResult
from workers.assembly import Assembly
from workers.borrower import Borrower
from workers.checked_params import checked_params
from workers.encode_fetch import OutputFetches
from workers.encode_input import encoder_input, forced_tokens
from workers.engine.sequence import Sequence
from workers.engine.step_plan import Chunk, StepOutcome
from workers.fetch import Fetch
from workers.followers import Followers
from workers.pairs import Pairs
from workers.reads import Reads
from workers.serving import Phase, Request, Tokens
from workers.supply import RETRY_S, Supply


class DecodeStage:
    """What a worker with the role `decode` does with the engine and the connector."""

    def __init__(
        self,
        parts: Assembly,
        pairs: Pairs,
        reads: Reads,
        borrower: Borrower,
        outputs: OutputFetches,
        metrics: Metrics,
        limits: SchedulerConfig,
        me: pb.WorkerRef,
    ) -> None:
        self._scheduler = parts.scheduler
        self._next_id = parts.next_id
        self._shares_prefixes = parts.blocks.enable_prefix_cache
        self._constraints = parts.constraints
        self._metrics = metrics
        self._limits = limits
        self._me = me
        self._requests: dict[RequestKey, Request] = {}
        self._by_sequence: dict[int, Request] = {}
        self._attempts: dict[str, RequestKey] = {}  # open request ids
        self._pairs = pairs
        self._borrower = borrower
        self._outputs = outputs
        self._compatibility_hash = parts.compatibility_hash
        self._forced = forced_tokens(parts.encoder)
        self._block_size = parts.block_size
        self._supply = Supply(parts, pairs, reads, borrower, outputs, metrics, limits, self._resume)
        self._followers = Followers(parts.block_size)
        self._tokens = Tokens(metrics)
        self.draining = False  # takes no new requests

    @property
    def num_open(self) -> int:
        return len(self._requests) + self._supply.num_lingering

    @property
    def num_pending(self) -> int:
        return sum(request.phase in (Phase.PENDING, Phase.ENCODING) for request in self._requests.values())

    # ------------------------------------------------------------------ from the ingress

    def submit(self, session: Session, submit: pb.Submit, now: float) -> None:
        key = RequestKey.of(submit.key)
        older = self._attempts.get(key.request_id)
        if older is not None and older.attempt >= key.attempt:
            self._metrics.dropped_frames.labels(DropReason.OLD_ATTEMPT).inc()
            return
        if older is not None:
            self._settle(self._requests[older], now, error=Cancelled(f"attempt {key.attempt} replaces this one"))
        try:
            if self.draining:
                raise Draining(f"{self._me.name} is draining; try another worker")
            if self.num_pending + self._scheduler.num_waiting >= self._limits.max_waiting:
                raise Busy(f"{self._me.name} has {self._limits.max_waiting} requests waiting; retry later")
            params = checked_params(submit.sampling, self._constraints)
            root = root_of(submit.chain_root)
            source = encoder_input(submit.encoder_token_ids, root, self._compatibility_hash)
            request = Request.of(session, submit, params, source, self._forced, self._me, self._next_id(), now)
            self._scheduler.check(request.sequence)
        except RequestError as error:
            self._tokens.fail(session, key, len(submit.emitted_token_ids), error)
            return
        self._requests[key] = self._by_sequence[request.sequence.id] = request
        self._attempts[key.request_id] = key
        leader_key = self._attempts.get(submit.leader_id)
        leader = None if leader_key is None or not self._shares_prefixes else self._requests[leader_key]
        if leader is None or leader is request or not self._followers.add(leader, request):
            self._try(self._supply.start, request, now)

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
        request.stages.ticket(ticket, now)
        if self._supply.read(request, fetch, session, ticket, now) and self._hear(request, fetch, ticket, now):
            request.route.prefill_prefix_hit_tokens = ticket.prefix_hit_tokens
            request.route.prefill_s += ticket.compute_s
            request.route.queue_s += ticket.queue_s
            if ticket.HasField("fetched"):
                request.route.fetched.CopyFrom(ticket.fetched)
            self._hand_off(request, fetch, ticket.handoff, now)
        if request.key in self._requests:
            self._try(self._advance, request, now)

    def kv_failed(self, session: Session, failed: pb.KvFailed, now: float) -> None:
        found = self._fetching(session, failed.key, failed.ask)
        if found is None:
            return
        request, fetch = found
        if failed.failure.code in (pb.INVALID, pb.TOO_LONG, pb.DEADLINE):
            self._settle(request, now, error=from_failure(failed.failure))
            return
        if failed.failure.code == pb.DRAINING:
            self._pairs.closed.add(session.peer.incarnation)
        fetch.lose(failed.failure.message, now, died=failed.failure.code == pb.INTERNAL)
        self._try(self._advance, request, now)

    def pulled(self, result: PullResult, now: float) -> None:
        """A read is over."""
        request = self._requests.get(result.key)
        if self._supply.pulled(request, result, now) and request is not None:
            self._try(self._advance, request, now)

    def session_broken(self, session: Session, now: float) -> None:
        """An ingress or a source is gone."""
        for request in list(self._requests.values()):
            if request.session is session:
                self._settle(request, now, error=Cancelled("the ingress is gone"))
            elif request.fetch is not None and request.fetch.session is session:
                request.fetch.lose(str(session.error), now, died=True)
                self._try(self._advance, request, now)
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
                self._try(self._supply.check_wait, request, now)
        pending = [each for each in self._requests.values() if each.phase is Phase.PENDING and each.not_before <= now]
        for request in sorted(pending, key=lambda each: (-each.sequence.priority, each.sequence.arrival)):
            self._try(self._supply.start, request, now)

    def settle(self, outcome: StepOutcome, began_at: float, now: float) -> None:
        """Tokens of a step go out, finished requests end, preempted ones ask a source again."""
        for row in (*outcome.chunks, *outcome.tokens):
            if (request := self._by_sequence.get(row.seq.id)) is not None:
                request.stepped(self._metrics, began_at)
        for chunk in outcome.chunks:
            self._computed(chunk, began_at, now)
        for emitted in outcome.tokens:
            request = self._by_sequence.get(emitted.seq.id)
            if request is None:
                continue
            request.emitted_here(began_at, now)
            logprobs = () if emitted.logprobs is None else (emitted.logprobs.wire(),)
            self._tokens.add(request, emitted.first_token_index, [emitted.token], logprobs)
            if emitted.finish is not None:
                self._settle(request, now, finish=emitted.finish)
        for sequence, vector in outcome.vectors:
            if (request := self._by_sequence.get(sequence.id)) is not None:
                request.emitted_here(began_at, now)
                self._settle(request, now, finish=FinishReason.STOP, embedding=vector)
        for sequence, hypotheses in outcome.searches:
            if (request := self._by_sequence.get(sequence.id)) is not None:
                request.emitted_here(began_at, now)
                self._settle(request, now, finish=hypotheses[0].finish, hypotheses=hypotheses)
        for sequence in outcome.preempted:
            request = self._by_sequence.get(sequence.id)
            if request is None:
                continue
            request.route.preemptions += 1
            request.stages.preempted(now)
            if self._supply.may_pull(request):
                self._scheduler.park(sequence)
                request.pend(now, RETRY_S)

    def fail(self, sequence: Sequence, error: RequestError, now: float) -> None:
        """The step of this sequence failed."""
        if (request := self._by_sequence.get(sequence.id)) is not None:
            self._settle(request, now, error=error)

    def hand_over(self, now: float, *, streams: bool) -> None:
        """Requests go to other workers, with what they have emitted; those that have begun only if `streams`."""
        for request in list(self._requests.values()):
            begun = request.has_stepped or request.sequence.num_emitted > 0
            if streams or not begun:
                self._metrics.handovers.inc()
                self._settle(request, now, error=Draining(f"{self._me.name} hands its requests over"))

    def flush(self, step: int, now: float) -> None:
        """Before a step and after it: begins what waited for another, then one frame per ingress with the news."""
        for request in self._followers.take_released():
            self._try(self._supply.start, request, now)
        self._tokens.flush(step)

    # ------------------------------------------------------------------ one request

    def _try(self, act: Callable[[Request, float], None], request: Request, now: float) -> None:
        """What goes wrong ends that request alone."""
        try:
            act(request, now)
        except RequestError as error:
            self._settle(request, now, error=error)

    def _resume(self, request: Request, error: RequestError | None, now: float) -> None:
        """The output of its encoder is here, or is to be made here."""
        request.stages.encoded(self._outputs.told(request.sequence), now, "" if error is None else str(error))
        if error is not None:
            self._settle(request, now, error=error)
            return
        vector = self._outputs.vector(request.sequence)
        if vector:
            self._settle(request, now, finish=FinishReason.STOP, embedding=vector)
            return
        request.pend(now, 0.0)
        self._try(self._supply.start, request, now)

    def _advance(self, request: Request, now: float) -> None:
        self._supply.advance(request, now)
        self._followers.progressed(request, now)

    def _fetching(self, session: Session, key: pb.RequestKey, ask: int) -> tuple[Request, Fetch] | None:
        """The request and its fetch that a source's frame is about; frames of other asks are dropped and counted."""
        request = self._requests.get(RequestKey.of(key))
        fetch = request.fetch if request is not None else None
        if request is None or fetch is None or fetch.session is not session or fetch.ask != ask or fetch.source_lost:
            self._metrics.dropped_frames.labels(DropReason.UNKNOWN_REQUEST).inc()
            return None
        return request, fetch

    def _hear(self, request: Request, fetch: Fetch, ticket: pb.Ticket, now: float) -> bool:
        """Passes on what a ticket says of the prompt. Whether a whole handoff is to be taken with it; a source that
        leaves something out is given up."""
        params, handoff = request.sequence.params, ticket.handoff
        whole = True
        if ticket.prompt_logprobs and request.sequence.params.num_prompt_logprobs is not None:
            whole = self._tokens.add_prompt_logprobs(request, ticket.first_prompt_logprob, ticket.prompt_logprobs)
        if ticket.last:
            num_logprobs = len(handoff.token_ids) if params.num_logprobs is not None else 0
            whole &= not request.lacks_prompt_logprobs and len(handoff.logprobs) == num_logprobs
            whole &= bool(handoff.token_ids if params.pooling is None else handoff.embedding)
        if not whole:
            fetch.last_ticket = False
            fetch.lose("the source left out a part of what was asked for", now, died=False)
        return whole and ticket.last

    def _hand_off(self, request: Request, fetch: Fetch, handoff: pb.Handoff, now: float) -> None:
        """The source's first tokens: known input from here on, told at once, whatever the blocks do."""
        sequence = request.sequence
        if sequence.params.pooling is not None:
            self._settle(request, now, finish=FinishReason.STOP, embedding=handoff.embedding)
            return
        if sequence.params.beams is not None:
            return  # its beams begin with the last position, computed here anew: the source's token is none of theirs
        for offset, token in enumerate(handoff.token_ids):
            if fetch.num_tokens + offset < len(sequence.tokens):
                continue  # a second source drew it again: the same one
            index = sequence.num_emitted
            finish = self._scheduler.append_token(sequence, token)
            self._tokens.add(request, index, [token], handoff.logprobs[offset : offset + 1])
            if finish is not None:
                self._settle(request, now, finish=finish)
                return

    def _computed(self, chunk: Chunk, began_at: float, now: float) -> None:
        """A piece of its prompt was computed here."""
        request = self._by_sequence.get(chunk.seq.id)
        if request is None:
            return
        request.stages.computed(chunk.num_confirmed, began_at)
        self._followers.progressed(request, now)
        if chunk.prompt_logprobs is not None:
            first, entries = chunk.prompt_logprobs
            told = self._tokens.add_prompt_logprobs(request, first, [entry.wire() for entry in entries])
            assert told, f"{chunk.seq}: prompt logprobs from {first} on, after {request.num_prompt_logprobs}"

    # ------------------------------------------------------------------ the end

    def _settle(
        self,
        request: Request,
        now: float,
        *,
        finish: FinishReason | None = None,
        embedding: bytes = b"",
        hypotheses: SequenceOf[Hypothesis] = (),
        error: RequestError | None = None,
    ) -> None:
        """The one way out: blocks, source, followers and ingress all hear of it."""
        del self._requests[request.key], self._by_sequence[request.sequence.id]
        del self._attempts[request.key.request_id]
        self._supply.leave_source(request)
        fetched = self._borrower.leave(request.sequence)
        if fetched is not None:
            request.route.fetched.CopyFrom(fetched)
        encoded = self._outputs.leave(request.sequence)
        if encoded is not None:
            request.route.encoded.CopyFrom(encoded)
        request.tell_skipped(self._block_size)
        self._scheduler.abort(request.sequence)
        self._followers.gone(request, now)
        request.stages.close(now, "" if error is None else str(error))
        if error is not None:
            emitted = request.sequence.num_emitted
            self._tokens.fail(request.session, request.key, emitted, error, request.route, request.stages.take())
        else:
            assert finish is not None
            self._tokens.end(request, finish, embedding=embedding, hypotheses=hypotheses)

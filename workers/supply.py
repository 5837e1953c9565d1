"""How the KV of a request gets to this worker: reserved blocks and a source that fills them, or our own engine.

The decode stage owns the requests; what is raised here ends one. An embedding needs no KV here: its source is asked
with nothing reserved, and leases nothing. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from cluster.config import SchedulerConfig
from cluster.errors import NoWorker, RequestError, RequestTooLong
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.session import Session
from kvtransfer.connector import BlockSpan, Outcome, PullResult
from workers.assembly import Assembly
from workers.borrower import Borrower
from workers.encode_fetch import OutputFetches
from workers.fetch import Fetch, Lingering
from workers.pairs import Pairs
from workers.reads import Reads
from workers.serving import Phase, Request

RETRY_S = 0.05  # before a source that was busy, or a pool that was full, is asked again


class Supply:
    """Between the scheduler's reservations, the sources of `Pairs` and the executors that read."""

    def __init__(
        self,
        parts: Assembly,
        pairs: Pairs,
        reads: Reads,
        borrower: Borrower,
        outputs: OutputFetches,
        metrics: Metrics,
        limits: SchedulerConfig,
        resume: Callable[[Request, RequestError | None, float], None],
    ) -> None:
        """`resume` takes up a request whose encoder input has been read elsewhere, or ends it with the error."""
        self._scheduler = parts.scheduler
        self._block_size = parts.block_size
        self._pairs = pairs
        self._reads = reads
        self._borrower = borrower
        self._outputs = outputs
        self._resume = resume
        self._metrics = metrics
        self._limits = limits
        self._lingering = Lingering()
        self._suspect: Request | None = None  # a source died while it computed this prompt; another computes it now

    @property
    def num_lingering(self) -> int:
        """Asks whose requests are gone, and whose reads are not."""
        return len(self._lingering)

    # ------------------------------------------------------------------ asking

    def start(self, request: Request, now: float) -> None:
        """PENDING: finds a source and blocks, or computes here where the plan says so; first the output of its encoder
        comes, if it has one. Raises RequestError."""
        then, may_read = partial(self._resume, request), request.local_allowed or not request.encoders
        if self._outputs.begin(
            request.sequence, request.encoders, then, now, may_read=may_read, deadline=request.deadline
        ):
            request.phase = Phase.ENCODING
            request.stages.encoding(now)
            return
        if not request.remote or request.sequence.only_encodes:
            self._compute_here(request, "plan", now)
            return
        if self._scheduler.lacks_output(request.sequence):  # no encoder is within reach: our own reads the input
            self._compute_here(request, "no_encoder", now)
            return
        session = self._pairs.pick(request.sources, ())
        if session is None:
            if request.local_allowed:
                self._compute_here(request, "no_source", now)
            elif now - request.pending_since > self._limits.max_pull_wait_s:
                raise NoWorker("no prefill worker is within reach; start one")
            else:
                request.wait(now + RETRY_S)
            return
        if self._waits_its_turn(request):
            request.wait(now + RETRY_S)
            return
        fetch = self._fetch(request, now)
        if fetch is not None:
            request.fetch = fetch
            request.phase = Phase.PULLING
            self._ask(request, fetch, session, now)
        elif request.phase is Phase.PENDING:
            request.wait(now + RETRY_S)

    def may_pull(self, request: Request) -> bool:
        """Whether a preempted request goes to a source again, or waits for one."""
        return request.remote and (not request.local_allowed or self._pairs.pick(request.sources, ()) is not None)

    def _fetch(self, request: Request, now: float) -> Fetch | None:
        """What a source is to fill; None: no room now, or the prompt is computed here."""
        sequence = request.sequence
        if sequence.params.pooling is not None:
            return Fetch(len(sequence.tokens), (), ())
        try:
            reservation = self._scheduler.reserve_for_pull(sequence)
        except RequestTooLong:  # for a reservation, which may not fill the pool; not for computing here
            if not request.local_allowed:
                raise
            self._compute_here(request, "too_long_to_pull", now)
            return None
        if reservation is None:
            return None
        request.route.decode_prefix_hit_tokens = reservation.hit_tokens
        self._metrics.prefix_hit_tokens.labels("decode").inc(reservation.hit_tokens)
        self._metrics.prefix_lookup_tokens.labels("decode").inc(len(sequence.tokens))
        destinations = tuple(
            BlockSpan(group, reservation.first_block, blocks)
            for group, blocks in enumerate(reservation.destination)
            if sequence.grows(group)
        )
        return Fetch(len(sequence.tokens), destinations, reservation.raises)

    def _ask(self, request: Request, fetch: Fetch, session: Session, now: float) -> None:
        sequence, params = request.sequence, request.sequence.params
        request.num_asks += 1
        fetch.begin(session, request.num_asks, now)
        tokens = sequence.tokens[: fetch.num_tokens]
        request.stages.asked(session.peer, len(tokens), now)
        num_full, rest = divmod(len(tokens), self._block_size)
        if not request.lacks_prompt_logprobs:
            params = replace(params, num_prompt_logprobs=None)
        params = replace(params, beams=None)  # a search begins here, with the last position computed anew
        frame = pb.KvRequest(
            key=request.key.wire(),
            token_ids=tokens,
            num_prompt_tokens=sequence.num_prompt,
            block_hashes=b"".join(sequence.hashes[:num_full]),
            first_block=fetch.valid_blocks() if fetch.destinations else num_full + bool(rest),
            sampling=params.wire(),
            priority=sequence.priority,
            deadline_ms=request.remaining_ms(now),
            ask=fetch.ask,
            holding=request.holding,
            chain_root=sequence.chain_root or b"",
            encoder_token_ids=() if sequence.encoder_input is None else sequence.encoder_input.tokens,
            encoders=request.encoders,
        )
        session.send(pb.Frame(kv_request=frame), request.key)

    # ------------------------------------------------------------------ reading

    def read(self, request: Request, fetch: Fetch, session: Session, ticket: pb.Ticket, now: float) -> bool:
        """Reads the blocks of a ticket; False: they are not what was asked for, and the source is given up."""
        if ticket.runs:
            request.stages.reading(session.peer, self._pairs.transport(session), now)
        return self._reads.begin(request.key, fetch, session, ticket, now)

    def pulled(self, request: Request | None, result: PullResult, now: float) -> bool:
        """All ranks are through with one pull. Whether the request waited for it."""
        fetch = request.fetch if request is not None else None
        if request is None or fetch is None or result.pull.id not in fetch.in_flight:
            self._lingering.ended(result.key, result.pull.id)
            return False
        fetch.landed(result.valid_pairs)
        request.route.blocks += len(result.valid_pairs)
        if result.valid_pairs:
            request.route.transport = result.transport
        request.route.bytes += result.num_bytes
        read_s = fetch.end_read(result.pull.id, now)
        request.route.transfer_s += read_s
        request.stages.read(len(result.valid_pairs), result.num_bytes, read_s)
        if result.outcome is not Outcome.OK:
            reason = f"{result.outcome}: {'; '.join(result.errors) or 'read thrown away'}"
            fetch.lose(reason, now, died=result.outcome is Outcome.LOST)
            fetch.blocks_stuck |= result.outcome is Outcome.STUCK
        return True

    def advance(self, request: Request, now: float) -> None:
        """After anything that may have completed or failed a fetch; reads in flight decide first. Raises
        RequestError."""
        fetch = request.fetch
        if fetch is None or fetch.in_flight:
            return
        if fetch.source_lost:
            self._lose_source(request, fetch, now)
        elif fetch.complete:
            self.leave_source(request)
            request.fetch = None
            request.phase = Phase.RUNNING
            request.stages.arrived(now)
            self._scheduler.pull_done(request.sequence, fetch.num_tokens)

    def check_wait(self, request: Request, now: float) -> None:
        """A reservation without a ticket for too long goes back, so that two full workers cannot wait for ever.
        Raises RequestError."""
        fetch = request.fetch
        assert fetch is not None
        if fetch.parked:
            self._ask_another(request, fetch, now)
            return
        if fetch.is_silent(now):
            fetch.give_up_reads()
            self.advance(request, now)
            return
        if fetch.had_ticket or fetch.source_lost or not fetch.destinations:
            return
        if now - fetch.asked_at >= self._limits.max_pull_wait_s:
            self._requeue(request, fetch, now)

    # ------------------------------------------------------------------ without this source

    def leave_source(self, request: Request) -> None:
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

    def _lose_source(self, request: Request, fetch: Fetch, now: float) -> None:
        """Another source, or our own engine, goes on from the blocks that have come."""
        request.stages.lost(fetch.source_lost, now)
        self.leave_source(request)
        error: RequestError | None = request.blame(fetch)
        if error is not None:
            raise error
        if fetch.blocks_stuck:
            self._requeue(request, fetch, now)
        else:
            self._ask_another(request, fetch, now)

    def _waits_its_turn(self, request: Request) -> bool:
        """Of the prompts under which a source died, one is with a source at a time: if that dies, too, it is known of
        what, and the others are not blamed."""
        other = self._suspect
        if not request.num_deaths or other is request:
            return False
        at_source = other is not None and other.fetch is not None and other.fetch.awaits_source
        if not at_source:
            self._suspect = request
        return at_source

    def _ask_another(self, request: Request, fetch: Fetch, now: float) -> None:
        session = self._pairs.pick(request.sources, fetch.tried)
        fetch.parked = session is not None and self._waits_its_turn(request)
        if fetch.parked:
            fetch.source_lost = ""
            return
        if session is not None:
            self._metrics.spares_used.inc()
            request.route.spare_used += 1
            self._ask(request, fetch, session, now)
            return
        if not request.local_allowed:
            self._requeue(request, fetch, now)  # until one comes; those tried may live, busy or after a mishap
            return
        request.fetch = None
        if request.lacks_prompt_logprobs or not fetch.destinations:  # blocks alone do not tell what is read off them
            request.route.recomputed_tokens += fetch.num_tokens
            if fetch.destinations:
                self._scheduler.release_pull(request.sequence)
            self._compute_here(request, "source_lost", now)
            return
        valid_tokens = min(fetch.valid_blocks() * self._block_size, fetch.num_tokens)
        request.route.recomputed_tokens += fetch.num_tokens - valid_tokens
        self._metrics.local_prefills.labels("source_lost").inc()
        request.phase = Phase.RUNNING
        request.stages.compute_here()
        self._scheduler.pull_done(request.sequence, valid_tokens)

    def _requeue(self, request: Request, fetch: Fetch, now: float) -> None:
        request.stages.lost("given back, to be asked for again", now)
        self.leave_source(request)
        if fetch.destinations:
            self._scheduler.release_pull(request.sequence)
        request.fetch = None
        request.pend(now, RETRY_S)

    def _compute_here(self, request: Request, reason: str, now: float) -> None:
        self._metrics.local_prefills.labels(reason).inc()
        request.route.local_prefill = True
        request.stages.compute_here()
        request.phase = Phase.RUNNING
        if not self._borrower.begin(request.sequence, request.holding, now):
            self._scheduler.add(request.sequence)

"""A request on the decode worker that serves it, and the frames in which its tokens leave."""

from __future__ import annotations

import os
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import Enum

from cluster import hashing
from cluster.errors import RequestError, SourcesLost
from cluster.hidden_states import HiddenStates
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import FinishReason, Hypothesis, Pooling, RequestKey, SamplingParams
from cluster.session import Session
from workers.engine.sequence import EncoderInput, ForcedTokens, Sequence
from workers.fetch import Fetch
from workers.stage_log import StageLog

MAX_SOURCE_DEATHS = 2  # then the request is poisoned: neither a third source nor our own engine tries it


def count_prefix_lookup(metrics: Metrics, stage: str, sequence: Sequence) -> None:
    """Of a sequence computed here. Where every prompt position is needed, nothing is looked up."""
    if not sequence.params.needs_whole_prompt:
        metrics.prefix_hit_tokens.labels(stage).inc(sequence.prefix_hit_tokens)
        metrics.prefix_lookup_tokens.labels(stage).inc(len(sequence.tokens))


class Phase(Enum):
    """Drawn in workers/decode.py."""

    PENDING = "pending"
    ENCODING = "encoding"
    PULLING = "pulling"
    RUNNING = "running"


@dataclass(slots=True, eq=False)
class Request:
    """One request from submit to settle."""

    key: RequestKey
    session: Session  # of the ingress
    sequence: Sequence
    sources: tuple[pb.WorkerRef, ...]  # as planned: the first, then the spare
    encoders: tuple[pb.WorkerRef, ...]  # as planned, as the sources; none: this worker reads its input
    remote: bool  # the plan puts prefill on another worker
    local_allowed: bool
    holding: pb.Holding  # of whoever computes the prompt; may be empty
    accepted_at: float
    pending_since: float
    deadline: float | None
    route: pb.Route
    stages: StageLog
    phase: Phase = Phase.PENDING
    fetch: Fetch | None = None
    not_before: float = 0.0
    num_asks: int = 0
    num_deaths: int = 0  # of sources, under this request
    stepped_at: float | None = None  # when its first step here began
    num_replayed: int = 0  # tokens that an earlier attempt emitted
    num_prompt_logprobs: int = 0  # told to the ingress, of prompt tokens 1 …

    @classmethod
    def of(
        cls,
        session: Session,
        submit: pb.Submit,
        params: SamplingParams,
        source: EncoderInput | None,
        forced: ForcedTokens,
        me: pb.WorkerRef,
        sequence_id: int,
        now: float,
    ) -> Request:
        key = RequestKey.of(submit.key)
        only_encodes = source is not None and params.pooling is not None
        sequence = Sequence(
            sequence_id,
            key,
            [] if only_encodes else [*submit.prompt_token_ids, *submit.emitted_token_ids],
            0 if only_encodes else len(submit.prompt_token_ids),
            params,
            arrival=sequence_id,
            priority=submit.priority,
            hashes=hashing.split(submit.block_hashes),
            chain_root=hashing.root_of(submit.chain_root) if source is None else None,
            encoder_input=source,
            forced=forced,
            only_encodes=only_encodes,
        )
        stages = [stage for stage in submit.plan.stages if stage.stage == pb.PREFILL]
        return cls(
            key=key,
            session=session,
            sequence=sequence,
            sources=_others(submit.plan, pb.PREFILL, me),
            encoders=_others(submit.plan, pb.ENCODE, me),
            remote=any(stage.worker.incarnation != me.incarnation for stage in stages),
            local_allowed=submit.plan.local_prefill_allowed,
            holding=next((stage.holding for stage in stages), pb.Holding()),
            accepted_at=now,
            pending_since=now,
            deadline=now + submit.deadline_ms / 1000 if submit.deadline_ms else None,
            route=pb.Route(decode=me, decode_pid=os.getpid(), prompt_tokens=len(submit.prompt_token_ids)),
            stages=StageLog(me, now, on=bool(submit.traceparent)),
            num_replayed=len(submit.emitted_token_ids),
        )

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether the ingress waits for more of them."""
        sequence = self.sequence
        wanted = sequence.params.num_prompt_logprobs is not None
        return wanted and self.num_prompt_logprobs < sequence.num_prompt - 1

    def skip_told(self, first: int, count: int) -> int | None:
        """How many of `count` prompt logprobs from prompt token `first` on were told already; the others count as
        told from now on. None: some before them are missing."""
        known = self.num_prompt_logprobs + 1 - first
        if known < 0:
            return None
        self.num_prompt_logprobs = max(self.num_prompt_logprobs, first + count - 1)
        return min(known, count)

    @property
    def has_stepped(self) -> bool:
        return self.stepped_at is not None

    def stepped(self, metrics: Metrics, began_at: float) -> None:
        """It was in a step of this worker's engine; the first one counts."""
        if self.stepped_at is not None:
            return
        self.stepped_at = max(began_at, self.accepted_at)
        metrics.queue.labels("decode").observe(self.stepped_at - self.accepted_at)
        if self.route.local_prefill:  # for the others the reservation counted
            self.route.decode_prefix_hit_tokens = self.sequence.prefix_hit_tokens
            count_prefix_lookup(metrics, "decode", self.sequence)

    def emitted_here(self, began_at: float, now: float) -> None:
        """A token was drawn here; the first one after a prompt that was computed here ends its prefill."""
        route = self.route
        if self.stages.on:
            self.stages.emitted(began_at, now, self.sequence.prefix_hit_tokens)
        if route.local_prefill and not route.prefill_s and self.stepped_at is not None:
            route.queue_s = self.stepped_at - self.accepted_at
            route.prefill_s = now - self.stepped_at

    def tell_skipped(self, block_size: int) -> None:
        """The last word: what nobody computed."""
        route = self.route
        hits = route.decode_prefix_hit_tokens if route.local_prefill else route.prefill_prefix_hit_tokens
        route.skipped_blocks = hits // block_size + route.fetched.blocks
        if route.local_prefill:
            route.queue_s = max(0.0, route.queue_s - route.fetched.seconds)

    def wait(self, until: float) -> None:
        self.not_before = until

    def pend(self, now: float, pause_s: float) -> None:
        """-> PENDING again; its patience starts anew."""
        self.phase = Phase.PENDING
        self.pending_since = now
        self.not_before = now + pause_s

    def blame(self, fetch: Fetch) -> RequestError | None:
        """Counts a source that died under this request; the error when there were too many, and no other may try."""
        self.num_deaths += fetch.under_it
        if self.num_deaths < MAX_SOURCE_DEATHS:
            return None
        told = f"{self.num_deaths} sources died or failed while they computed the prompt of {self.key.request_id}"
        return SourcesLost(f"{told} (last: {fetch.source_lost})")

    def remaining_ms(self, now: float) -> int:
        """For the next hop; 0 means none, so the last millisecond stays one."""
        return 0 if self.deadline is None else max(1, int((self.deadline - now) * 1000))


def _others(plan: pb.Plan, kind: pb.Stage, me: pb.WorkerRef) -> tuple[pb.WorkerRef, ...]:
    """Who runs a stage elsewhere: the first, then the spare."""
    stages = [stage for stage in plan.stages if stage.stage == kind]
    return tuple(
        ref
        for stage in stages
        for ref in (stage.worker, stage.spare)
        if ref.incarnation and ref.incarnation != me.incarnation
    )


class Tokens:
    """Collects what one turn of the loop tells each ingress."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._out: dict[Session, list[pb.SequenceTokens]] = {}

    def add(
        self, request: Request, first_token_index: int, tokens: list[int], logprobs: Iterable[pb.TokenLogprobs] = ()
    ) -> None:
        """`logprobs`: one per token, if they are asked for."""
        self._put(
            request.session,
            pb.SequenceTokens(
                key=request.key.wire(),
                first_token_index=first_token_index,
                token_ids=tokens,
                logprobs=logprobs,
                stages=request.stages.take(),
            ),
        )

    def add_prompt_logprobs(self, request: Request, first: int, entries: SequenceOf[pb.TokenLogprobs]) -> bool:
        """Of prompt tokens from index `first` on, each told once. False: some before them are missing."""
        known = request.skip_told(first, len(entries))
        if known is None:
            return False
        if known < len(entries):
            piece = pb.SequenceTokens(
                key=request.key.wire(),
                first_token_index=request.num_replayed,  # they come before all new ones
                prompt_logprobs=entries[known:],
                first_prompt_logprob=first + known,
            )
            self._put(request.session, piece)
        return True

    def end(
        self,
        request: Request,
        finish: FinishReason,
        *,
        embedding: bytes = b"",
        hypotheses: SequenceOf[Hypothesis] = (),
    ) -> None:
        """The last word about a request. Nothing follows it."""
        sequence = request.sequence
        if sequence.params.pooling is Pooling.STATES:
            assert sequence.encoder_input is not None
            states, embedding = HiddenStates.of_rows(embedding, len(sequence.encoder_input.tokens)), b""
            try:
                states.send(request.session, request.key)
            except RequestError as error:
                self.fail(request.session, request.key, 0, error, request.route, request.stages.take())
                return
        last = pb.SequenceTokens(
            key=request.key.wire(),
            first_token_index=sequence.num_emitted,
            finish=finish.value,
            route=request.route,
            embedding=embedding,
            hypotheses=[each.wire() for each in hypotheses],
            stages=request.stages.take(),
        )
        self._put(request.session, last)

    def fail(
        self,
        session: Session,
        key: RequestKey,
        num_emitted: int,
        error: RequestError,
        route: pb.Route | None = None,
        stages: Iterable[pb.StageReport] = (),
    ) -> None:
        """The last word about a request that failed, or was never taken."""
        self._metrics.engine_failures.labels("decode", pb.ErrorCode.Name(error.code).lower()).inc()
        last = pb.SequenceTokens(
            key=key.wire(),
            first_token_index=num_emitted,
            finish=pb.ERROR,
            failure=pb.Failure(code=error.code, message=str(error)),
            route=route,
            stages=stages,
        )
        self._put(session, last)

    def forget(self, session: Session) -> None:
        self._out.pop(session, None)

    def flush(self, step: int) -> None:
        for session, sequences in self._out.items():
            session.send_tokens(step, sequences)
        self._out.clear()

    def _put(self, session: Session, sequence: pb.SequenceTokens) -> None:
        self._out.setdefault(session, []).append(sequence)

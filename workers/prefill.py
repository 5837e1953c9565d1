"""The prefill stage: computes prompts for sinks and leases them the blocks, chunk by chunk.

    KvRequest ─▶ computing ──first token sampled──▶ computed ──Release──▶ gone
                    │ Cancel, deadline, session broken
                    ▼
                 aborted ──Release, or the ledger's quarantine──▶ gone

Engine thread only. A ticket leaves after the step of its chunk has settled, so its blocks are written. Leased
blocks are pinned by the ledger: the sequence goes as soon as its last ticket is out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

from cluster import hashing
from cluster.config import SchedulerConfig
from cluster.errors import Busy, DeadlineExceeded, Draining, RequestError
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.session import Session
from kvtransfer.connector import BlockSpan
from workers.assembly import Assembly
from workers.borrower import Borrower
from workers.checked_params import checked_params
from workers.encode_fetch import OutputFetches
from workers.encode_input import encoder_input, forced_tokens
from workers.engine.sequence import Sequence
from workers.engine.step_plan import Chunk, StepOutcome
from workers.serving import count_prefix_lookup


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt being computed for one sink."""

    key: RequestKey
    ask: int
    session: Session
    sequence: Sequence
    next_block: int  # position of the first block without a ticket
    accepted_at: float
    deadline: float | None
    holding: pb.Holding
    started_at: float | None = None
    num_chunks: int = 0


class PrefillStage:
    """What a worker with the role `prefill` does with the engine and the connector."""

    def __init__(
        self,
        parts: Assembly,
        borrower: Borrower,
        outputs: OutputFetches,
        metrics: Metrics,
        limits: SchedulerConfig,
        name: str,
    ) -> None:
        self._scheduler = parts.scheduler
        self._source = parts.source
        self._borrower = borrower
        self._outputs = outputs
        self._compatibility_hash = parts.compatibility_hash
        self._forced = forced_tokens(parts.encoder)
        self._next_id = parts.next_id
        self._block_size = parts.block_size
        self._constraints = parts.constraints
        self._metrics = metrics
        self._limits = limits
        self._name = name
        self._prompts: dict[RequestKey, Prompt] = {}
        self._by_sequence: dict[int, Prompt] = {}
        self.draining = False  # takes no new prompts

    @property
    def num_open(self) -> int:
        """Prompts being computed; leases are the ledger's to count."""
        return len(self._prompts)

    def request(self, session: Session, ask: pb.KvRequest, now: float) -> None:
        """Queues a prompt; what cannot be queued is answered with KvFailed."""
        key = RequestKey.of(ask.key)
        if key in self._prompts:
            self._drop(self._prompts[key])
        try:
            if self.draining:
                raise Draining(f"{self._name} is draining; ask another source")
            if self._scheduler.num_waiting >= self._limits.max_waiting:
                raise Busy(f"{self._name} has {self._limits.max_waiting} prompts waiting; ask another source")
            sequence_id = self._next_id()
            root = hashing.root_of(ask.chain_root)
            source = encoder_input(ask.encoder_token_ids, root, self._compatibility_hash)
            sequence = Sequence(
                sequence_id,
                key,
                list(ask.token_ids),
                ask.num_prompt_tokens,
                checked_params(ask.sampling, self._constraints),
                arrival=sequence_id,
                priority=ask.priority,
                hashes=hashing.split(ask.block_hashes),
                chain_root=root if source is None else None,
                encoder_input=source,
                forced=self._forced,
                stop_after_first=True,
            )
            self._scheduler.check(sequence)
        except RequestError as error:
            self._refuse(session, key, ask.ask, error)
            return
        deadline = now + ask.deadline_ms / 1000 if ask.deadline_ms else None
        prompt = Prompt(key, ask.ask, session, sequence, ask.first_block, now, deadline, ask.holding)
        self._prompts[key] = self._by_sequence[sequence_id] = prompt
        try:
            then = partial(self._encoded, prompt)
            if not self._outputs.begin(sequence, ask.encoders, then, now, may_read=True, deadline=deadline):
                self._compute(prompt, now)
        except RequestError as error:
            self.fail(sequence, error)

    def cancel(self, session: Session, key: RequestKey) -> None:
        """Stops computing. What was leased stays so until the sink's Release: it may be reading."""
        prompt = self._prompts.get(key)
        if prompt is not None and prompt.session is session:
            self._drop(prompt)

    def release(self, session: Session, release: pb.Release) -> None:
        """The sink has its blocks, or wants them no more."""
        key = RequestKey.of(release.key)
        prompt = self._prompts.get(key)
        if prompt is not None:
            if prompt.session is not session or prompt.ask != release.ask:
                return
            self._drop(prompt)
        self._source.release(key)

    def session_broken(self, session: Session, now: float) -> None:
        """A sink is gone, maybe in the middle of a read."""
        for prompt in [each for each in self._prompts.values() if each.session is session]:
            self._drop(prompt)
        self._source.end_session(session.id, now)

    def tick(self, now: float) -> None:
        late = [each for each in self._prompts.values() if each.deadline is not None and each.deadline <= now]
        for prompt in late:
            self._drop(prompt)
            error = DeadlineExceeded(f"the deadline of {prompt.key.request_id} passed during prefill")
            self._refuse(prompt.session, prompt.key, prompt.ask, error)

    def settle(self, outcome: StepOutcome, began_at: float, now: float) -> None:
        """A ticket for every chunk that this step finished; the last one brings the first token, or the embedding."""
        handoffs = {sequence.id: pb.Handoff(embedding=vector) for sequence, vector in outcome.vectors}
        for sampled in outcome.tokens:
            logprobs = None if sampled.logprobs is None else [sampled.logprobs.wire()]
            handoffs[sampled.seq.id] = pb.Handoff(token_ids=[sampled.token], logprobs=logprobs)
        for chunk in outcome.chunks:
            prompt = self._by_sequence.get(chunk.seq.id)
            if prompt is not None:
                if prompt.started_at is None:
                    self._start(prompt, max(began_at, prompt.accepted_at))
                self._ticket(prompt, chunk, handoffs.get(chunk.seq.id), now)

    def fail(self, sequence: Sequence, error: RequestError) -> None:
        """The step of this sequence failed."""
        prompt = self._by_sequence.get(sequence.id)
        if prompt is not None:
            self._drop(prompt)
            self._refuse(prompt.session, prompt.key, prompt.ask, error)

    def hand_over(self) -> None:
        """Prompts that are not computed yet go to other sources."""
        for prompt in list(self._prompts.values()):
            self._drop(prompt)
            error = Draining(f"{self._name} leaves; ask another source")
            self._refuse(prompt.session, prompt.key, prompt.ask, error)

    def overflow(self, key: RequestKey) -> None:
        """The sink does not read its tickets: they were dropped, so it must ask another source."""
        prompt = self._prompts.get(key)
        if prompt is not None:
            self._metrics.overflows.inc()
            self._drop(prompt)
            error = Busy(f"the tickets of {key.request_id} did not fit into the outbox of {self._name}")
            self._refuse(prompt.session, prompt.key, prompt.ask, error)

    def _encoded(self, prompt: Prompt, error: RequestError | None, now: float) -> None:
        """The output of its encoder is here, or is to be made here."""
        try:
            if error is not None:
                raise error
            self._compute(prompt, now)
        except RequestError as failure:
            self.fail(prompt.sequence, failure)

    def _compute(self, prompt: Prompt, now: float) -> None:
        if not self._borrower.begin(prompt.sequence, prompt.holding, now):
            self._scheduler.add(prompt.sequence)

    def _start(self, prompt: Prompt, now: float) -> None:
        """Its first step began."""
        prompt.started_at = now
        self._metrics.queue.labels("prefill").observe(now - prompt.accepted_at)
        count_prefix_lookup(self._metrics, "prefill", prompt.sequence)

    def _ticket(self, prompt: Prompt, chunk: Chunk, handoff: pb.Handoff | None, now: float) -> None:
        last, read_off = handoff is not None, chunk.prompt_logprobs
        end = -(-chunk.num_confirmed // self._block_size) if last else chunk.num_confirmed // self._block_size
        if end <= prompt.next_block and not last and read_off is None:
            return
        spans = [
            BlockSpan(group, prompt.next_block, tuple(table[prompt.next_block : end]))
            for group, table in enumerate(prompt.sequence.block_tables)
            if end > prompt.next_block and prompt.sequence.grows(group)
        ]
        runs = self._source.publish(prompt.key, prompt.session.id, spans, now) if spans else ()
        ticket = pb.Ticket(
            key=prompt.key.wire(),
            chunk=prompt.num_chunks,
            runs=[run.wire() for run in runs],
            num_tokens=chunk.num_confirmed,
            last=last,
            handoff=handoff,
            ask=prompt.ask,
            pid=os.getpid(),
        )
        if read_off is not None:
            ticket.first_prompt_logprob = read_off.first
            ticket.prompt_logprobs.extend(entry.wire() for entry in read_off.entries)
        prompt.num_chunks += 1
        prompt.next_block = max(prompt.next_block, end)
        if last:
            assert prompt.started_at is not None
            fetched = self._forget(prompt)
            if fetched is not None:
                ticket.fetched.CopyFrom(fetched)
            ticket.prefix_hit_tokens = prompt.sequence.prefix_hit_tokens
            ticket.queue_s = max(0.0, prompt.started_at - prompt.accepted_at - ticket.fetched.seconds)
            ticket.compute_s = now - prompt.started_at
        prompt.session.send(pb.Frame(ticket=ticket), prompt.key)

    def _refuse(self, session: Session, key: RequestKey, ask: int, error: RequestError) -> None:
        self._metrics.engine_failures.labels("prefill", pb.ErrorCode.Name(error.code).lower()).inc()
        failure = pb.Failure(code=error.code, message=str(error))
        session.send(pb.Frame(kv_failed=pb.KvFailed(key=key.wire(), failure=failure, ask=ask)), key)

    def _drop(self, prompt: Prompt) -> None:
        self._forget(prompt)
        self._scheduler.abort(prompt.sequence)

    def _forget(self, prompt: Prompt) -> pb.Fetched | None:
        """What was fetched for it."""
        del self._prompts[prompt.key], self._by_sequence[prompt.sequence.id]
        self._outputs.leave(prompt.sequence)
        return self._borrower.leave(prompt.sequence)

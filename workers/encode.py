"""The encode stage: reads encoder inputs for sinks and leases them what decoders read of the output.

    EncodeRequest ─▶ waiting or being read ──Ticket──▶ leased ──Release──▶ gone
                        │ Cancel, deadline, session broken
                        ▼
                     aborted

An input that is cached is not read again, whoever asked first. Leases are the ledger's, and end with it. Engine thread
only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from cluster import hashing
from cluster.config import SchedulerConfig
from cluster.errors import Busy, DeadlineExceeded, Draining, RequestError
from cluster.hidden_states import HiddenStates
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import Pooling, RequestKey, SamplingParams
from cluster.session import Session
from kvtransfer.connector import BlockRun, BlockSpan
from workers.assembly import Assembly
from workers.encode_input import encoder_input
from workers.engine.sequence import Sequence
from workers.engine.step_plan import StepOutcome


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """An input that one sink waits for."""

    key: RequestKey
    session: Session
    sequence: Sequence
    accepted_at: float
    deadline: float | None


class EncodeStage:
    """What a worker with the role `encode` does with the engine and the connector."""

    def __init__(self, parts: Assembly, metrics: Metrics, limits: SchedulerConfig, name: str) -> None:
        self._scheduler = parts.scheduler
        self._source = parts.source
        self._next_id = parts.next_id
        self._compatibility_hash = parts.compatibility_hash
        self._metrics = metrics
        self._limits = limits
        self._name = name
        self._readings: dict[RequestKey, Reading] = {}
        self._by_sequence: dict[int, Reading] = {}
        self.draining = False  # takes no new inputs

    @property
    def num_open(self) -> int:
        """Inputs that sinks wait for; leases are the ledger's to count."""
        return len(self._readings)

    @property
    def num_queued_tokens(self) -> int:
        """Of these inputs. O(inputs)."""
        inputs = (each.sequence.encoder_input for each in self._readings.values())
        return sum(len(each.tokens) for each in inputs if each is not None)

    def request(self, session: Session, ask: pb.EncodeRequest, now: float) -> None:
        """Queues an input; what cannot be queued is answered with KvFailed. Raises ValueError for a root that is
        none."""
        key = RequestKey.of(ask.key)
        if key in self._readings:
            self._drop(self._readings[key])
        root = hashing.root_of(ask.chain_root)
        sequence_id = self._next_id()
        try:
            if self.draining:
                raise Draining(f"{self._name} is draining; ask another encode worker")
            if len(self._readings) >= self._limits.max_waiting:
                raise Busy(f"{self._name} has {self._limits.max_waiting} inputs waiting; ask another encode worker")
            if not ask.token_ids:
                raise ValueError("an empty encoder input")
            sequence = Sequence(
                sequence_id,
                key,
                [],
                0,
                SamplingParams(max_tokens=1, pooling=Pooling(ask.pooling) if ask.pooling else None),
                arrival=sequence_id,
                priority=ask.priority,
                encoder_input=encoder_input(ask.token_ids, root, self._compatibility_hash),
                only_encodes=True,
            )
            self._scheduler.add(sequence)
        except RequestError as error:
            self._refuse(session, key, error)
            return
        deadline = now + ask.deadline_ms / 1000 if ask.deadline_ms else None
        self._readings[key] = self._by_sequence[sequence_id] = Reading(key, session, sequence, now, deadline)

    def cancel(self, session: Session, key: RequestKey) -> None:
        """Also of a release that comes before the ticket. What is leased stays so until the release."""
        reading = self._readings.get(key)
        if reading is not None and reading.session is session:
            self._drop(reading)

    def session_broken(self, session: Session) -> None:
        for reading in [each for each in self._readings.values() if each.session is session]:
            self._drop(reading)

    def tick(self, now: float) -> None:
        late = [each for each in self._readings.values() if each.deadline is not None and each.deadline <= now]
        for reading in late:
            self._drop(reading)
            error = DeadlineExceeded(f"the deadline of {reading.key.request_id} passed before its input was encoded")
            self._refuse(reading.session, reading.key, error)

    def settle(self, outcome: StepOutcome, began_at: float, now: float) -> None:
        """A ticket for every input that this step read, or that was found in the cache."""
        vectors = dict(outcome.vectors)
        for sequence in outcome.encoded:
            reading = self._by_sequence.get(sequence.id)
            if reading is None:
                continue
            self._forget(reading)
            vector = vectors.get(sequence, b"")
            if sequence.params.pooling is Pooling.STATES:
                assert sequence.encoder_input is not None
                states = HiddenStates.of_rows(vector, len(sequence.encoder_input.tokens))
                try:
                    states.send(reading.session, reading.key)
                except RequestError as error:
                    self._refuse(reading.session, reading.key, error)
                    continue
                vector = b""
            started_at = max(began_at, reading.accepted_at)
            self._metrics.queue.labels("encode").observe(started_at - reading.accepted_at)
            runs: SequenceOf[BlockRun] = ()
            if sequence not in vectors:
                group, blocks = sequence.output_blocks()
                runs = self._source.publish(reading.key, reading.session.id, [BlockSpan(group, 0, blocks)], now)
            ticket = pb.Ticket(
                key=reading.key.wire(),
                runs=[run.wire() for run in runs],
                last=True,
                pid=os.getpid(),
                queue_s=started_at - reading.accepted_at,
                compute_s=now - started_at,
                handoff=pb.Handoff(embedding=vector) if vector else None,
            )
            reading.session.send(pb.Frame(ticket=ticket), reading.key)

    def fail(self, sequence: Sequence, error: RequestError) -> None:
        """The step of this sequence failed."""
        reading = self._by_sequence.get(sequence.id)
        if reading is not None:
            self._drop(reading)
            self._refuse(reading.session, reading.key, error)

    def hand_over(self) -> None:
        """Inputs that are not read yet go to other encode workers."""
        for reading in list(self._readings.values()):
            self._drop(reading)
            self._refuse(reading.session, reading.key, Draining(f"{self._name} leaves; ask another encode worker"))

    def overflow(self, key: RequestKey) -> None:
        """The sink does not read its ticket: it was dropped."""
        reading = self._readings.get(key)
        if reading is not None:
            self._metrics.overflows.inc()
            self._drop(reading)

    def _refuse(self, session: Session, key: RequestKey, error: RequestError) -> None:
        self._metrics.engine_failures.labels("encode", pb.ErrorCode.Name(error.code).lower()).inc()
        failure = pb.Failure(code=error.code, message=str(error))
        session.send(pb.Frame(kv_failed=pb.KvFailed(key=key.wire(), failure=failure)), key)

    def _drop(self, reading: Reading) -> None:
        self._forget(reading)
        self._scheduler.abort(reading.sequence)

    def _forget(self, reading: Reading) -> None:
        del self._readings[reading.key], self._by_sequence[reading.sequence.id]

"""One trace per request: from its arrival here to its last token, with the stages that its workers told.

The ingress alone makes spans, when the request has ended: of a worker that died, what its last frame said is in the
trace, and the attempt that it ended has an error. A worker's times begin where its attempt was sent; no two clocks are
compared, and nothing but OTLP/HTTP from here to a collector is added. Names and sizes, never what a client wrote.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.log import Log
from cluster.metrics import Outcome
from cluster.protos import worker_pb2 as pb
from cluster.traces_config import TracesConfig
from router.journal import AttemptEntry, Journal

_SEND_EVERY_MS: Final = 5000
_SEND_S: Final = 5.0  # for one batch, its repetitions included
_MAX_QUEUED: Final = 8192  # spans; the oldest are dropped

_NAMES: Final[Mapping[int, str]] = {
    pb.ENCODING: "encode",
    pb.PREFILLING: "prefill",
    pb.TRANSFERRING: "transfer",
    pb.DECODING: "decode",
}

_SCOPE: Final = InstrumentationScope("sluice")
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_UNSET: Final = Status()

Attributes: TypeAlias = dict[str, str | int | float | bool]


class Traces:
    """Of one ingress replica. `stop` once, with no request open; it may take as long as one batch."""

    def __init__(self, config: TracesConfig, *, app: str, instance: str, model: str, log: Log) -> None:
        assert config.endpoint is not None, "traces are off"
        library = logging.getLogger("opentelemetry.exporter")
        library.propagate = False  # what it says of every failed batch, we say once
        library.addHandler(logging.NullHandler())
        self._exporter = _Exporter(config.endpoint, log)
        self._processor = BatchSpanProcessor(
            self._exporter, max_queue_size=_MAX_QUEUED, schedule_delay_millis=_SEND_EVERY_MS
        )
        self._resource = Resource.create({"service.name": app, "service.instance.id": instance})
        self._ids = RandomIdGenerator()
        self._sampler = TraceIdRatioBased(config.sample_rate)
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def begin(self, path: str, headers: Mapping[str, str], request_id: str) -> Trace | None:
        """Of a request that just arrived; None: it is not traced. What is no trace context in `headers` counts as
        none, as W3C asks."""
        parent = get_current_span(self._propagator.extract(headers)).get_span_context()
        trace_id = parent.trace_id if parent.is_valid else self._ids.generate_trace_id()
        if parent.is_valid:
            is_chosen = parent.trace_flags.sampled
        else:
            is_chosen = self._sampler.should_sample(None, trace_id, path).decision.is_sampled()
        if not is_chosen:
            return None
        attributes: Attributes = {
            "http.request.method": "POST",
            "http.route": path,
            "sluice.http_request_id": request_id,
            "gen_ai.request.model": self._model,
        }
        return Trace(
            self, f"POST {path}", self.context(parent, trace_id), parent if parent.is_valid else None, attributes
        )

    def context(self, parent: SpanContext, trace_id: int) -> SpanContext:
        """Of a new span."""
        return SpanContext(trace_id, self._ids.generate_span_id(), False, _SAMPLED, parent.trace_state)

    def tell(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        times_ns: tuple[int, int],
        attributes: Attributes,
        *,
        error: str = "",
        kind: SpanKind = SpanKind.INTERNAL,
        events: Sequence[Event] = (),
    ) -> None:
        """A span that has ended. The SDK's own way to it, by way of a tracer, takes several times as long."""
        span = ReadableSpan(
            name,
            context,
            parent,
            self._resource,
            attributes,
            events,
            kind=kind,
            status=Status(StatusCode.ERROR, error) if error else _UNSET,
            start_time=times_ns[0],
            end_time=times_ns[1],
            instrumentation_scope=_SCOPE,
        )
        self._processor.on_end(span)

    def flush(self) -> None:
        """Sends what has ended so far. Blocks."""
        self._processor.force_flush()

    def stop(self) -> None:
        self._exporter.closes = True
        self._processor.shutdown()


class Trace:
    """Of one HTTP request. `end` once; the journals that it gave out are closed by then."""

    def __init__(
        self, traces: Traces, name: str, context: SpanContext, parent: SpanContext | None, attributes: Attributes
    ) -> None:
        self._traces = traces
        self._name = name
        self._context = context
        self._parent = parent
        self._attributes = attributes
        self._began_at = time.monotonic()
        self._zero_ns = time.time_ns() - int(self._began_at * 1e9)
        self._traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        self._journals: list[Journal] = []

    def journal(self) -> Journal:
        """For one sequence of the request."""
        self._journals.append(Journal(traceparent=self._traceparent))
        return self._journals[-1]

    def end(self, outcome: Outcome) -> None:
        ended_at = time.monotonic()
        opened = [journal for journal in self._journals if journal.opened_at]
        first_at = min((journal.opened_at for journal in opened), default=ended_at)
        self._child("prepare", self._context, self._began_at, first_at, {})
        for journal in opened:
            self._sequence(journal, ended_at)
        attributes = self._attributes
        attributes |= {"sluice.outcome": outcome.value, "sluice.num_sequences": len(self._journals)}
        if outcome is not Outcome.OK:
            attributes["error.type"] = outcome.value
        is_ours = outcome in (Outcome.FAILED, Outcome.NO_WORKER, Outcome.DEADLINE)  # the client's own faults are none
        self._traces.tell(
            self._name,
            self._context,
            self._parent,
            self._ns(self._began_at, ended_at),
            attributes,
            error=outcome.value if is_ours else "",
            kind=SpanKind.SERVER,
        )

    # ------------------------------------------------------------ from what was noted to spans

    def _sequence(self, journal: Journal, ended_at: float) -> None:
        ended_at = journal.ended_at or ended_at
        attributes: Attributes = {
            "sluice.request_id": journal.request_id,
            "gen_ai.usage.input_tokens": journal.num_prompt_tokens + journal.num_encoder_tokens,
            "gen_ai.usage.output_tokens": sum(entry.num_tokens for entry in journal.attempts),
            "sluice.attempts": len(journal.attempts),
        }
        if journal.finish is not None:
            attributes["sluice.finish"] = journal.finish.name.lower()
        error = "" if journal.error is None else type(journal.error).__name__
        sequence = self._child("sequence", self._context, journal.opened_at, ended_at, attributes, error)
        self._child("queue", sequence, journal.opened_at, journal.admitted_at or ended_at, {})
        for entry in journal.attempts:
            self._attempt(entry, sequence, ended_at)

    def _attempt(self, entry: AttemptEntry, parent: SpanContext, ended_at: float) -> None:
        ended_at = entry.ended_at or ended_at
        error = "" if entry.failure is None else _told(entry.failure)
        attempt = self._traces.context(parent, parent.trace_id)
        first = (
            () if entry.first_token_at is None else (Event("first token", timestamp=self._at(entry.first_token_at)),)
        )
        self._traces.tell(
            f"attempt {entry.number}",
            attempt,
            parent,
            self._ns(entry.sent_at, ended_at),
            _of_attempt(entry),
            error=error,
            kind=SpanKind.CLIENT,
            events=first,
        )
        for report in entry.stages.values():
            began = min(entry.sent_at + report.began_s, ended_at)
            ended = min(entry.sent_at + report.ended_s, ended_at) if report.HasField("ended_s") else ended_at
            cut = error and "the attempt ended" if not report.HasField("ended_s") else ""
            name = _NAMES.get(report.kind, "stage")
            self._child(name, attempt, began, ended, _of_stage(report), report.error or cut)

    def _child(
        self, name: str, parent: SpanContext, began_at: float, ended_at: float, attributes: Attributes, error: str = ""
    ) -> SpanContext:
        context = self._traces.context(parent, parent.trace_id)
        self._traces.tell(name, context, parent, self._ns(began_at, ended_at), attributes, error=error)
        return context

    def _ns(self, began_at: float, ended_at: float) -> tuple[int, int]:
        return self._at(began_at), self._at(ended_at)

    def _at(self, at: float) -> int:
        return self._zero_ns + int(at * 1e9)


def _told(failure: pb.Failure) -> str:
    """Of a refusal the code only: it may quote the request."""
    code = pb.ErrorCode.Name(failure.code).lower()
    return code if failure.code in (pb.INVALID, pb.TOO_LONG) else f"{code}: {failure.message}"


def _of_attempt(entry: AttemptEntry) -> Attributes:
    plan, route = entry.plan, entry.route
    attributes: Attributes = {
        "sluice.attempt": entry.number,
        "sluice.replay": entry.is_replay,
        "sluice.tokens_known": entry.num_emitted_before,
        "sluice.tokens": entry.num_tokens,
        "sluice.worker": plan.decode.name,
        "sluice.incarnation": plan.decode.incarnation,
        "sluice.pid": plan.decode.pid,
        "sluice.plan.prefill": plan.prefill.name,
    }
    others = {"spare": plan.spare, "encode": plan.encode, "holder": plan.holding and plan.holding.holder}
    attributes |= {f"sluice.plan.{name}": worker.name for name, worker in others.items() if worker is not None}
    if plan.local_reason is not None:
        attributes["sluice.plan.local_reason"] = plan.local_reason.value
    if entry.leader:
        attributes["sluice.plan.follows"] = entry.leader
    if route is not None:
        attributes |= {
            "sluice.decode_prefix_hit_tokens": route.decode_prefix_hit_tokens,
            "sluice.local_prefill": route.local_prefill,
            "sluice.recomputed_tokens": route.recomputed_tokens,
            "sluice.skipped_blocks": route.skipped_blocks,
            "sluice.preemptions": route.preemptions,
            "sluice.spare_used": bool(route.spare_used),
        }
    return attributes


def _of_stage(report: pb.StageReport) -> Attributes:
    """What is 0 for its kind is left out."""
    attributes: Attributes = {"sluice.worker": report.worker.name, "sluice.incarnation": report.worker.incarnation}
    num_computed = report.tokens - report.prefix_hit_tokens - report.fetched.tokens
    sizes: Attributes = {
        "pid": report.pid,
        "tokens": report.tokens,
        "chunks": report.chunks,
        "blocks": report.blocks,
        "bytes": report.bytes,
        "transport": report.transport,
        "queue_s": report.queue_s,
        "compute_s": report.compute_s,
        "read_s": report.read_s,
        "gb_per_s": report.bytes / report.read_s / 1e9 if report.read_s > 0 else 0.0,
        "tokens_per_s": num_computed / report.compute_s if report.compute_s > 0 else 0.0,
    }
    if report.HasField("fetched"):
        fetched = report.fetched
        sizes |= {"fetched_from": fetched.holder.name, "fetched_blocks": fetched.blocks}
        sizes |= {"fetched_bytes": fetched.bytes, "fetch_s": fetched.seconds}
    attributes |= {f"sluice.{name}": value for name, value in sizes.items() if value}
    if report.kind == pb.PREFILLING:
        attributes["sluice.prefix_hit_tokens"] = report.prefix_hit_tokens
    return attributes


class _Exporter(SpanExporter):
    """OTLP over HTTP, in the thread of its processor; a collector that is away costs spans and one line of the log."""

    def __init__(self, endpoint: str, log: Log) -> None:
        self._inner = OTLPSpanExporter(endpoint, timeout=_SEND_S)
        self._address = endpoint
        self._log = log
        self._is_down = False
        self.closes = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._is_down and self.closes:
            return SpanExportResult.FAILURE
        result = self._inner.export(spans)
        is_down = result is not SpanExportResult.SUCCESS
        if is_down and not self._is_down:
            self._log.warning("traces are not delivered", address=self._address)
        elif self._is_down and not is_down:
            self._log.info("traces are delivered again", address=self._address)
        self._is_down = is_down
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

"""Every Prometheus metric, declared once.

A process makes one `Metrics` and hands it down; each has a registry of its own, so that two can live in one
process (tests, loopback). Names are `sluice_<part>_<what>_<unit>`; prometheus_client adds `_total` to counters.
All methods of prometheus_client are thread-safe. Labels come from closed sets (outcomes, roles, states,
transports) or from the members of one cluster (peers by name, which outlives a restart), never from requests. None
is called like a label that a scraped process has as a whole: see deploy/prometheus.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from enum import StrEnum
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric

from cluster.protos import worker_pb2 as pb

CONTENT_TYPE = CONTENT_TYPE_LATEST

# Seconds: one step on a GPU is some milliseconds, a long prompt on a CPU some tens of seconds.
_REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_READ_S = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Outcome(StrEnum):
    """How a request ended, as its client saw it."""

    OK = "ok"
    INVALID = "invalid"  # 4xx other than the below
    BUSY = "busy"  # 429
    NO_WORKER = "no_worker"  # 503
    DEADLINE = "deadline"  # 504
    CANCELLED = "cancelled"  # by the client, gone included
    FAILED = "failed"  # 500


class PullOutcome(StrEnum):
    """How one read of KV blocks ended."""

    OK = "ok"
    STALE = "stale"  # a generation differed: the blocks were reused
    LATE = "late"  # took longer than transfer.late_read_s
    LOST = "lost"  # the source is gone
    STUCK = "stuck"  # never completed: blocks quarantined


class FetchOutcome(StrEnum):
    """What became of a prefix that a plan says another worker holds."""

    OK = "ok"
    PARTIAL = "partial"  # the holder had only some of it
    REFUSED = "refused"  # the holder had none of it, or did not answer
    LOST = "lost"  # the holder died, or a read failed: what came before counts
    CANCELLED = "cancelled"  # the request ended first
    UNNEEDED = "unneeded"  # it is in the worker's own cache, or no cached block serves the request
    NO_PAIR = "no_pair"  # the holder is not within reach
    NO_ROOM = "no_room"  # no blocks to fetch into


class DropReason(StrEnum):
    """Why a frame about a request was thrown away."""

    OLD_ATTEMPT = "old_attempt"
    REPEATED_INDEX = "repeated_index"
    UNKNOWN_REQUEST = "unknown_request"
    UNSUPPORTED = "unsupported"


# What `reason`, `limit` and `stage` may be, where no class above says so.
_CODES = tuple(name.lower() for name, number in pb.ErrorCode.items() if number)
_STAGES = ("encode", "prefill", "decode")
_BROKEN = ("mistake", "gone", "closed", "silent", "stuffed")
_LIMITS = ("queue_full", "predicted_ttft", "key_max_concurrent", "key_tokens_per_minute", "key_requests_per_minute")
_LOCAL_PLANS = ("configured", "no_source", "short", "saturated")
_LOCAL_PREFILLS = ("plan", "no_encoder", "no_source", "source_lost", "too_long_to_pull")


class Registry(CollectorRegistry):
    """Whoever reads it sees all or nothing of what was set under `whole`."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        with self.whole:
            families = list(super().collect())
        return iter(families)


class Metrics:
    """The metrics of one process: ingress, worker or controller. Grouped by the part that keeps them."""

    def __init__(self) -> None:
        self.registry = Registry()
        r = self.registry

        # What clients see; kept by the ingress.
        self.requests = Counter("sluice_ingress_requests", "Requests that ended, by outcome", ["outcome"], registry=r)
        self.open_requests = Gauge("sluice_ingress_open_requests", "Requests that have not ended", registry=r)
        self.queued_requests = Gauge(
            "sluice_ingress_queued_requests", "Open requests that wait for their turn", registry=r
        )
        self.admission_wait = Histogram(
            "sluice_ingress_queue_seconds", "Arrival to turn", buckets=_REQUEST_S, registry=r
        )
        self.rejections = Counter(
            "sluice_ingress_rejections", "Requests answered 429, by the limit that they met", ["limit"], registry=r
        )
        self.ttft = Histogram("sluice_ingress_ttft_seconds", "Arrival to first token", buckets=_REQUEST_S, registry=r)
        self.inter_token = Histogram(
            "sluice_ingress_inter_token_seconds", "Between two tokens of a stream", buckets=_TOKEN_S, registry=r
        )
        self.end_to_end = Histogram(
            "sluice_ingress_end_to_end_seconds", "Arrival to last token", buckets=_REQUEST_S, registry=r
        )
        self.prompt_tokens = Counter("sluice_ingress_prompt_tokens", "Prompt tokens of accepted requests", registry=r)
        self.generated_tokens = Counter("sluice_ingress_generated_tokens", "Tokens sent to clients", registry=r)
        self.failures = Counter(
            "sluice_ingress_failures", "Requests and attempts that failed, by reason", ["reason"], registry=r
        )
        self.replays = Counter(
            "sluice_ingress_replays", "Requests sent on to another decode worker with what was emitted", registry=r
        )
        self.local_plans = Counter(
            "sluice_ingress_local_plans",
            "Attempts planned with the prompt computed by the decode worker, by reason",
            ["reason"],
            registry=r,
        )

        # What the router knows of caches; kept by the ingress.
        self.event_stream_alive = Gauge(
            "sluice_router_event_stream_alive", "1: this worker's block events are all known", ["peer"], registry=r
        )
        self.event_lag = Gauge(
            "sluice_router_event_lag_batches", "Batches of block events not heard yet, by worker", ["peer"], registry=r
        )
        self.event_gaps = Counter(
            "sluice_router_event_gaps", "Block events that were missing and asked for again", registry=r
        )
        self.indexed_blocks = Gauge(
            "sluice_router_indexed_blocks", "Blocks in the prefix index, once for each of their holders", registry=r
        )
        self.expected_hit_tokens = Counter(
            "sluice_router_expected_hit_tokens", "Tokens expected in the cache, by stage", ["stage"], registry=r
        )
        self.found_hit_tokens = Counter(
            "sluice_router_found_hit_tokens",
            "Tokens that were found there, of the same requests",
            ["stage"],
            registry=r,
        )

        # The engine of a worker.
        self.queue = Histogram(
            "sluice_engine_queue_seconds", "Acceptance to first step", ["stage"], buckets=_REQUEST_S, registry=r
        )
        self.waiting = Gauge("sluice_engine_waiting_sequences", "Sequences not yet scheduled", registry=r)
        self.running = Gauge("sluice_engine_running_sequences", "Sequences being computed", registry=r)
        self.pulling = Gauge("sluice_engine_pulling_sequences", "Sequences waiting for KV from a source", registry=r)
        self.computed_tokens = Counter("sluice_engine_computed_tokens", "Tokens computed in steps", registry=r)
        self.encoder_tokens = Counter(
            "sluice_engine_encoder_tokens", "Tokens of encoder inputs read in steps", registry=r
        )
        self.sampled_tokens = Counter(
            "sluice_engine_sampled_tokens",
            "Tokens drawn, a first one by the worker that computed the prompt; of a search one for each beam",
            registry=r,
        )
        self.drafted_rows = Counter(
            "sluice_engine_drafted_rows", "Sequences in steps that had guesses checked", registry=r
        )
        self.draft_tokens = Counter("sluice_engine_draft_tokens", "Tokens that were guessed and checked", registry=r)
        self.accepted_draft_tokens = Counter(
            "sluice_engine_accepted_draft_tokens",
            "Guesses that were right and all before them too: 1 + these per sequence is the acceptance length",
            registry=r,
        )
        self.batch_size = Histogram("sluice_engine_batch_sequences", "Sequences in a step", buckets=_BATCH, registry=r)
        self.step = Histogram("sluice_engine_step_seconds", "One step of the engine", buckets=_STEP_S, registry=r)
        self.preemptions = Counter("sluice_engine_preemptions", "Sequences put back because blocks ran out", registry=r)
        self.engine_failures = Counter(
            "sluice_engine_failures",
            "Requests that this worker refused or ended early, by reason",
            ["stage", "reason"],
            registry=r,
        )
        self.handovers = Counter(
            "sluice_engine_handovers", "Requests that a leaving worker handed over to others", registry=r
        )
        self.local_prefills = Counter(
            "sluice_engine_local_prefills", "Prompts that a decode worker computed itself", ["reason"], registry=r
        )
        self.prefix_hit_tokens = Counter(
            "sluice_engine_prefix_hit_tokens", "Prompt tokens found in the worker's own cache", ["stage"], registry=r
        )
        self.prefix_lookup_tokens = Counter(
            "sluice_engine_prefix_lookup_tokens", "Prompt tokens looked for in that cache", ["stage"], registry=r
        )

        # The block table and the ledger.
        self.blocks = Gauge(
            "sluice_kv_blocks",
            "Blocks, by group and state; a group's states add up to it",
            ["group", "state"],
            registry=r,
        )
        self.leases = Gauge("sluice_kv_leases", "Requests whose blocks are leased to a sink", registry=r)
        self.leased_blocks = Gauge("sluice_kv_leased_blocks", "Blocks under a lease", registry=r)
        self.expired_leases = Counter("sluice_kv_expired_leases", "Leases that ran out without a release", registry=r)
        self.quarantines = Counter(
            "sluice_kv_quarantines", "Blocks put into quarantine, by what might still touch them", ["side"], registry=r
        )

        # The bytes plane.
        self.transfer_bytes = Counter(
            "sluice_transfer_bytes", "KV bytes read, by transport and source", ["transport", "peer"], registry=r
        )
        self.transfer_seconds = Histogram(
            "sluice_transfer_read_seconds",
            "One read, by transport and source",
            ["transport", "peer"],
            buckets=_READ_S,
            registry=r,
        )
        self.transfer_rate = Gauge(
            "sluice_transfer_warm_rate_bytes_per_second",
            "Measured when the pair was warmed",
            ["transport", "peer"],
            registry=r,
        )
        self.pulls = Counter("sluice_transfer_pulls", "Reads, by outcome", ["outcome"], registry=r)
        self.pulled_blocks = Counter("sluice_transfer_pulled_blocks", "Blocks read and kept", registry=r)
        self.fetches = Counter(
            "sluice_transfer_fetches",
            "Prefixes to be fetched from a worker that holds them, rather than computed, by outcome",
            ["outcome"],
            registry=r,
        )
        self.fetched_tokens = Counter(
            "sluice_transfer_fetched_tokens", "Tokens not computed because their KV was fetched", registry=r
        )
        self.outputs = Counter(
            "sluice_transfer_encoder_outputs",
            "Outputs of encoders to be fetched from an encode worker, by outcome",
            ["outcome"],
            registry=r,
        )
        self.lent_blocks = Counter(
            "sluice_transfer_lent_blocks", "Cached blocks leased to workers that fetch them", registry=r
        )
        self.spares_used = Counter("sluice_transfer_spares_used", "Requests sent to the spare source", registry=r)

        # The words plane.
        self.sessions = Gauge("sluice_words_sessions", "Open sessions, by kind of peer", ["peer_kind"], registry=r)
        self.broken_sessions = Counter(
            "sluice_words_broken_sessions", "Sessions that broke, by reason", ["reason"], registry=r
        )
        self.dropped_frames = Counter(
            "sluice_words_dropped_frames", "Frames about a request thrown away, by reason", ["reason"], registry=r
        )
        self.overflows = Counter(
            "sluice_words_overflows", "Requests ended because their reader was too slow", registry=r
        )

        # Life; kept by the controller.
        self.workers = Gauge("sluice_cluster_workers", "Members, by pool and state", ["pool", "state"], registry=r)
        self.wanted_workers = Gauge(
            "sluice_cluster_wanted_workers", "Workers that the autoscaler asks for, by pool", ["pool"], registry=r
        )
        self.needed_workers = Gauge(
            "sluice_cluster_needed_workers", "Workers that the load needs, fractions too", ["pool", "stage"], registry=r
        )
        self.resizes = Counter(
            "sluice_cluster_resizes", "Changes by the autoscaler, by pool", ["pool", "direction"], registry=r
        )
        self.restarts = Counter("sluice_cluster_restarts", "Workers replaced, by pool", ["pool"], registry=r)

        # A series that is absent until its first event hides that event from rate(): closed sets start at 0.
        for metric, labels in (
            (self.requests, Outcome),
            (self.pulls, PullOutcome),
            (self.fetches, FetchOutcome),
            (self.outputs, FetchOutcome),
            (self.dropped_frames, DropReason),
            (self.failures, _CODES),
            (self.rejections, _LIMITS),
            (self.broken_sessions, _BROKEN),
            (self.local_plans, _LOCAL_PLANS),
            (self.local_prefills, _LOCAL_PREFILLS),
        ):
            for label in labels:
                metric.labels(label)
        for stage, code in product(_STAGES, _CODES):
            self.engine_failures.labels(stage, code)

    def set_blocks(self, group: str, counts: Mapping[str, int]) -> None:
        """All states of one group at once: {"free": 10, "filling": 0, ...}."""
        with self.registry.whole:
            for state, count in counts.items():
                self.blocks.labels(group, state).set(count)

    def set_workers(self, counts: Mapping[tuple[str, str], int]) -> None:
        """All members at once, by (pool, state)."""
        with self.registry.whole:
            for (pool, state), count in counts.items():
                self.workers.labels(pool, state).set(count)

    def render(self) -> bytes:
        """The text exposition format; serve it with `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def value(self, name: str, labels: Mapping[str, str] | None = None) -> float:
        """One sample by its full name, 0 before its first observation: for reports, doctor and tests."""
        sample = self.registry.get_sample_value(name, dict(labels or {}))
        return 0.0 if sample is None else sample

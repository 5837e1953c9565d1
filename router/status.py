"""What a router tells people of its workers: their last load reports, put into words."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.protos import worker_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTold:
    """Blocks by state; they add up to `num_blocks`."""

    name: str
    num_blocks: int
    free: int
    filling: int
    ready: int
    cached: int
    quarantined: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTold:
    """A worker and a source that it may read from, by name; by incarnation where the source is no member any more."""

    sink: str
    source: str
    warm: bool
    transport: str
    bytes_per_s: float
    """Measured when it was warmed, then of the reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTold:
    shard: int
    num_waiting: int
    num_running: int
    num_pulling: int
    queued_prefill_tokens: int
    queued_encoder_tokens: int
    prefill_tokens_per_s: float
    num_leases: int
    draining: bool
    groups: tuple[GroupTold, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTold:
    name: str
    incarnation: str
    pool: str
    state: str
    roles: tuple[str, ...]
    pid: int
    connected: bool
    """The replica that is asked has an open session to it."""
    leaving: bool
    shards: tuple[ShardTold, ...]
    """Those that have reported; none without a session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTold:
    workers: tuple[WorkerTold, ...]
    """All members in order of their names."""
    num_pairs: int
    pairs: tuple[PairTold, ...]
    """Of them the cold ones first, then the slowest."""


def pairs_told(reports: Iterable[tuple[str, pb.LoadReport]], names: Mapping[str, str], count: int) -> list[PairTold]:
    """The coldest and slowest `count` of all. `reports` by the sink's name; `names` of the members by incarnation."""
    found = ((pair.warm, pair.bytes_per_s, sink, pair) for sink, report in reports for pair in report.pairs)
    return [
        PairTold(
            sink=sink,
            source=names.get(pair.source_incarnation, pair.source_incarnation),
            warm=warm,
            transport=pair.transport,
            bytes_per_s=rate,
        )
        for warm, rate, sink, pair in heapq.nsmallest(count, found, key=lambda each: each[:3])
    ]


def shard_told(shard: int, report: pb.LoadReport) -> ShardTold:
    return ShardTold(
        shard=shard,
        num_waiting=report.num_waiting,
        num_running=report.num_running,
        num_pulling=report.num_pulling,
        queued_prefill_tokens=report.queued_prefill_tokens,
        queued_encoder_tokens=report.queued_encoder_tokens,
        prefill_tokens_per_s=report.prefill_tokens_per_s,
        num_leases=report.num_leases,
        draining=report.draining,
        groups=tuple(
            GroupTold(
                name=group.name,
                num_blocks=group.num_blocks,
                free=group.free,
                filling=group.filling,
                ready=group.ready,
                cached=group.cached,
                quarantined=group.quarantined,
            )
            for group in report.groups
        ),
    )

"""What a router tells people of its workers: their last load reports, put into words."""

from __future__ import annotations

from collections.abc import Mapping
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
    """A source that the worker may read from."""

    source: str
    """Its name, or its incarnation where that is no member any more."""
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
    pairs: tuple[PairTold, ...]


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
    """Those that have reported."""


def shard_told(shard: int, report: pb.LoadReport, names: Mapping[str, str]) -> ShardTold:
    """`names` of the members, by incarnation."""
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
        pairs=tuple(
            PairTold(
                source=names.get(pair.source_incarnation, pair.source_incarnation),
                warm=pair.warm,
                transport=pair.transport,
                bytes_per_s=pair.bytes_per_s,
            )
            for pair in report.pairs
        ),
    )

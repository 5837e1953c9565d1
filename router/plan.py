"""Which worker runs each stage of one request: the values that a plan is made from, and the plan.

Four modes (`router.local_prefill`):
  always       a decode worker that also has the role prefill computes the prompt itself (so does any, when nobody has
               that role); one without it takes a warm source where there is one
  conditional  a warm source, or the decode worker itself where little of the prompt is left to compute there, or where
               every source has too much to do; without any source as `fallback`
  fallback     a warm source wherever there is one, else the decode worker itself, counted
  never        a warm source, or no plan
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from cluster.config import Role
from cluster.protos import worker_pb2 as pb

if TYPE_CHECKING:
    from router.offer import Choice

LocalPrefill = Literal["never", "fallback", "conditional", "always"]

_NO_SOURCES: Mapping[str, float] = MappingProxyType({})


class Candidate(NamedTuple):
    """One shard of a worker that takes new requests, as this router sees it now."""

    name: str
    incarnation: str
    roles: frozenset[Role]
    shard: int = 0
    compatibility_hash: bytes = b""
    pid: int = 0
    connected: bool = True  # this router has an open session to it
    num_requests: int = 0  # waiting, pulling or running there, those just sent included
    queued_tokens: int = 0  # prompt tokens waiting to be computed there, those just sent included
    num_available_blocks: int | None = None  # free or cached; None: not told
    block_bytes: int = 0
    prefill_tokens_per_s: float = 0.0  # 0: not measured
    queued_encoder_tokens: int = 0  # waiting to be read by its encoder, those just sent included
    warm_sources: Mapping[str, float] = _NO_SOURCES  # that it can read KV from now: bytes/s by incarnation

    @property
    def ref(self) -> pb.WorkerRef:
        return pb.WorkerRef(name=self.name, incarnation=self.incarnation, shard=self.shard)


class LocalReason(StrEnum):
    """Why the decode worker computes the prompt itself."""

    CONFIGURED = "configured"  # local_prefill = always
    NO_SOURCE = "no_source"  # the fallback: no source is warm
    SHORT = "short"  # little is left to compute
    SATURATED = "saturated"  # every source has too much to do


class Holding(NamedTuple):
    """A worker with the first `num_blocks` blocks of a request in its cache."""

    holder: Candidate
    num_blocks: int

    def wire(self) -> pb.Holding:
        return pb.Holding(holder=self.holder.ref, num_blocks=self.num_blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Prefill and decode on one worker is the aggregated mode."""

    decode: Candidate
    prefill: Candidate
    spare: Candidate | None = None
    encode: Candidate | None = None  # None: the request has no encoder input
    encode_spare: Candidate | None = None
    num_encoder_tokens: int = 0  # that `encode` has to read: none where the output is held
    holding: Holding | None = None  # from whom `prefill` fetches rather than computes
    local_prefill_allowed: bool = False
    local_reason: LocalReason | None = None  # None: prefill is remote
    choice: Choice | None = field(default=None, compare=False, repr=False)  # what there was to choose from

    def wire(self) -> pb.Plan:
        prefill = pb.StagePlan(stage=pb.PREFILL, worker=self.prefill.ref)
        if self.spare is not None:
            prefill.spare.CopyFrom(self.spare.ref)
        if self.holding is not None:
            prefill.holding.CopyFrom(self.holding.wire())
        stages = [prefill, pb.StagePlan(stage=pb.DECODE, worker=self.decode.ref)]
        if self.encode is not None:
            encode = pb.StagePlan(stage=pb.ENCODE, worker=self.encode.ref)
            if self.encode_spare is not None:
                encode.spare.CopyFrom(self.encode_spare.ref)
            stages.insert(0, encode)
        return pb.Plan(
            stages=stages,
            local_prefill_allowed=self.local_prefill_allowed,
        )


@dataclass(frozen=True, slots=True)
class NoPlan:
    """Why nothing fits. `exhausted`: something would, but the request was turned away or failed there already."""

    reason: str
    exhausted: bool = False

"""Which worker runs each stage of one request: the plan, and how it is made from what the router sees. Pure.

Three modes (`router.local_prefill`):
  always    a decode worker that also has the role prefill computes the prompt itself (so does any, when nobody has
            that role); one without it takes a warm source where there is one
  fallback  a warm source wherever there is one, else the decode worker itself, counted
  never     a warm source, or no plan
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from cluster.config import Role
from cluster.protos import worker_pb2 as pb

LocalPrefill = Literal["never", "fallback", "always"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One shard of a worker that takes new requests, as this router sees it now."""

    name: str
    incarnation: str
    shard: int = 0
    roles: frozenset[Role]
    compatibility_hash: bytes = b""
    pid: int = 0
    connected: bool = True  # this router has an open session to it
    num_requests: int = 0  # waiting, pulling or running there, those just sent included
    queued_tokens: int = 0  # prompt tokens waiting to be computed there, those just sent included
    warm_sources: frozenset[str] = frozenset()  # incarnations that it can read KV from now

    @property
    def ref(self) -> pb.WorkerRef:
        return pb.WorkerRef(name=self.name, incarnation=self.incarnation, shard=self.shard)


class Policy(Protocol):
    """Chooses among workers that all fit. Implementations may keep state; one per router, its loop's thread only."""

    def pick(self, stage: Role, candidates: Sequence[Candidate]) -> Candidate:
        """One of `candidates`, which are not empty."""
        ...


class LocalReason(StrEnum):
    """Why the decode worker computes the prompt itself."""

    CONFIGURED = "configured"  # local_prefill = always
    NO_SOURCE = "no_source"  # the fallback: no source is warm


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Prefill and decode on one worker is the aggregated mode."""

    decode: Candidate
    prefill: Candidate
    spare: Candidate | None = None
    local_prefill_allowed: bool = False
    local_reason: LocalReason | None = None  # None: prefill is remote

    def wire(self) -> pb.Plan:
        prefill = pb.StagePlan(stage=pb.PREFILL, worker=self.prefill.ref)
        if self.spare is not None:
            prefill.spare.CopyFrom(self.spare.ref)
        return pb.Plan(
            stages=[prefill, pb.StagePlan(stage=pb.DECODE, worker=self.decode.ref)],
            local_prefill_allowed=self.local_prefill_allowed,
        )


@dataclass(frozen=True, slots=True)
class NoPlan:
    """Why nothing fits. `exhausted`: something would, but the request was turned away or failed there already."""

    reason: str
    exhausted: bool = False


def make_plan(
    candidates: Sequence[Candidate],
    policy: Policy,
    *,
    local_prefill: LocalPrefill,
    want_spare: bool,
    excluded: Collection[str] = (),
    shunned: Collection[str] = (),
) -> Plan | NoPlan:
    """`excluded` incarnations are not chosen for decode; `shunned` ones only when there is no other."""
    serving = [_Option(c, candidates, local_prefill) for c in candidates if Role.DECODE in c.roles and c.connected]
    usable = [option for option in serving if option.usable]
    allowed = [option for option in usable if option.decode.incarnation not in excluded]
    if not allowed:
        return _explain(candidates, bool(serving), bool(usable))
    options = [o for o in allowed if o.decode.incarnation not in shunned] or allowed
    # A remote source, or the local one that the configuration asks for, is better than a fallback.
    options = [o for o in options if o.sources or o.bound] or options
    decode = policy.pick(Role.DECODE, [option.decode for option in options])
    option = next(o for o in options if o.decode is decode)
    may_compute = local_prefill != "never"
    if option.bound or not option.sources:
        reason = LocalReason.CONFIGURED if option.bound else LocalReason.NO_SOURCE
        return Plan(decode=decode, prefill=decode, local_prefill_allowed=True, local_reason=reason)
    prefill = policy.pick(Role.PREFILL, option.sources)
    spare = _spare(prefill, option.sources) if want_spare else None
    return Plan(decode=decode, prefill=prefill, spare=spare, local_prefill_allowed=may_compute)


def _spare(prefill: Candidate, sources: Sequence[Candidate]) -> Candidate | None:
    """The source with the least to do after `prefill`; of equals the next by name. Takes no turn of the policy."""
    others = [source for source in sources if source is not prefill]
    return min(others, key=lambda c: (c.queued_tokens, c.num_requests, c.name < prefill.name, c.name), default=None)


class _Option:
    """A decode worker with the sources it could read from."""

    __slots__ = ("bound", "decode", "sources", "usable")

    def __init__(self, decode: Candidate, candidates: Sequence[Candidate], local_prefill: LocalPrefill) -> None:
        self.decode = decode
        nobody = all(Role.PREFILL not in c.roles for c in candidates)
        self.bound = local_prefill == "always" and (Role.PREFILL in decode.roles or nobody)
        self.sources = [
            c
            for c in candidates
            if Role.PREFILL in c.roles
            and c.connected  # otherwise it may be dead, which decode's last report cannot know
            and c.incarnation in decode.warm_sources
            and c.incarnation != decode.incarnation
            and c.compatibility_hash == decode.compatibility_hash
        ]
        self.usable = bool(self.sources) or local_prefill != "never"


def _explain(candidates: Sequence[Candidate], serving: bool, usable: bool) -> NoPlan:
    if usable:
        return NoPlan("every decode worker has turned the request away", exhausted=True)
    if serving:
        return NoPlan("no prefill worker is warm for any decode worker, and router.local_prefill is never")
    if any(Role.DECODE in c.roles for c in candidates):
        return NoPlan("no session to any decode worker is open")
    return NoPlan("no decode worker is ready")

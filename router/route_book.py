"""How the last requests were routed: what there was to choose from, what each way would have cost, what came of it."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from math import inf

import numpy as np

from cluster.protos import worker_pb2 as pb
from router.flight import Flight
from router.offer import Choice
from router.plan import Plan

MAX_WAYS = 16  # told of each attempt, the cheapest ones


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateTold:
    """A worker as it was seen when the request was placed."""

    name: str
    incarnation: str
    shard: int
    num_requests: int
    queued_tokens: int
    hit_blocks: int
    """Of the request, in its cache or on their way there, from the first block on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WayTold:
    """Costs are in blocks of prefill work; null where the policy counts none."""

    decode: str
    prefill: str | None
    """null: the decode worker computes the prompt."""
    chosen: bool
    prefill_blocks: float | None = None
    queue_blocks: float | None = None
    decode_blocks: float | None = None
    transfer_blocks: float | None = None
    total_blocks: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptTold:
    attempt: int
    decode: str
    prefill: str
    spare: str | None
    encode: str | None = None
    """null: the request has no encoder input."""
    encode_spare: str | None = None
    local_reason: str | None
    follows: str | None
    """The request whose plan it took, for they share a prompt."""
    fetches_from: str | None = None
    """Whose cache `prefill` was told to fetch the first blocks from."""
    held_blocks: int = 0
    """That are there."""
    num_tokens: int
    block_size: int
    num_ways: int
    ways: tuple[WayTold, ...] = ()
    """The cheapest, and the chosen one."""
    candidates: tuple[CandidateTold, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeTold:
    """What really happened, as the decode worker reports it."""

    decode: str
    prefill: str | None
    local_prefill: bool
    decode_prefix_hit_tokens: int
    prefill_prefix_hit_tokens: int
    recomputed_tokens: int
    skipped_blocks: int
    fetched_from: str | None
    fetched_blocks: int
    fetched_bytes: int
    fetch_ms: float
    blocks: int
    bytes: int
    transfer_ms: float
    queue_ms: float
    prefill_ms: float
    preemptions: int
    spare_used: bool
    encoded_by: str | None
    """null: no encoder input, or its output was found in the decode worker's cache."""
    encoder_tokens: int
    encoded_blocks: int
    encoded_bytes: int
    encode_ms: float
    encoders_lost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTold:
    request_id: str
    policy: str
    state: str
    """open, the finish reason, or the error's name."""
    attempts: tuple[AttemptTold, ...]
    outcome: OutcomeTold | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSummary:
    """A line of a list; what there was to choose from stands in `RouteTold`."""

    request_id: str
    state: str
    age_s: float
    """Since it was placed first."""
    attempts: int
    decode: str
    prefill: str
    """The decode worker itself where it computes the prompt."""
    fetches_from: str | None
    encode: str | None
    reason: str
    """Why it went there, in a few words."""
    num_tokens: int
    """Known when it was placed last."""
    hit_tokens: int
    """Found in caches or fetched from one. This and the rest: as reported at the end, 0 before."""
    blocks: int
    bytes: int
    transfer_ms: float
    prefill_ms: float


@dataclass(slots=True)
class _Entry:
    """What is kept is what was decided anyway; it is put into words when somebody asks."""

    began_at: float
    plans: list[tuple[Plan, int, str]] = field(default_factory=list)  # tokens, leader
    state: str = "open"
    route: pb.Route | None = None


class RouteBook:
    """The last `max_kept` requests. Written on the router's loop, read from any thread."""

    def __init__(self, policy: str, max_kept: int) -> None:
        self._policy = policy
        self._max_kept = max_kept
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def placed(self, flight: Flight, plan: Plan, *, leader: str) -> None:
        if not self._max_kept:
            return
        request_id = flight.request.request_id
        if flight.attempt == 1:  # an id may be used again
            self._entries[request_id] = _Entry(time.monotonic())
        entry = self._entries.setdefault(request_id, _Entry(time.monotonic()))
        entry.plans.append((plan, flight.num_tokens, leader))
        self._entries.move_to_end(request_id)
        if len(self._entries) > self._max_kept:
            self._entries.popitem(last=False)

    def ended(self, flight: Flight) -> None:
        entry = self._entries.get(flight.request.request_id)
        if entry is None:
            return
        entry.route = flight.route
        if flight.finish is not None:
            entry.state = flight.finish.name.lower()
        else:
            entry.state = type(flight.error).__name__ if flight.error is not None else "cancelled"

    def last(self, count: int) -> tuple[RouteSummary, ...]:
        """The youngest first."""
        now = time.monotonic()
        items = list(self._entries.items())
        items.sort(key=lambda item: -item[1].began_at)
        return tuple(_summary(request_id, entry, now) for request_id, entry in items[:count] if entry.plans)

    def tell(self, request_id: str) -> RouteTold | None:
        """None: it is not among the last ones here."""
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        return RouteTold(
            request_id=request_id,
            policy=self._policy,
            state=entry.state,
            attempts=tuple(
                _attempt(number, plan, num_tokens, leader)
                for number, (plan, num_tokens, leader) in enumerate(list(entry.plans), 1)
            ),
            outcome=None if entry.route is None else _outcome(entry.route),
        )


def _summary(request_id: str, entry: _Entry, now: float) -> RouteSummary:
    plan, num_tokens, leader = entry.plans[-1]
    route = entry.route or pb.Route()
    decode_hits, prefill_hits = route.decode_prefix_hit_tokens, route.prefill_prefix_hit_tokens
    computing = decode_hits if route.local_prefill else prefill_hits
    return RouteSummary(
        request_id=request_id,
        state=entry.state,
        age_s=now - entry.began_at,
        attempts=len(entry.plans),
        decode=plan.decode.name,
        prefill=plan.prefill.name,
        fetches_from=plan.holding.holder.name if plan.holding else None,
        encode=plan.encode.name if plan.encode else None,
        reason=_reason(plan, leader),
        num_tokens=num_tokens,
        hit_tokens=max(decode_hits, prefill_hits, computing + route.fetched.tokens),
        blocks=route.blocks,
        bytes=route.bytes,
        transfer_ms=1000 * route.transfer_s,
        prefill_ms=1000 * route.prefill_s,
    )


def _reason(plan: Plan, leader: str) -> str:
    if leader:
        return f"beside {leader[:8]}, which has the same prompt"
    if plan.holding is not None:
        return f"{plan.holding.holder.name} holds {plan.holding.num_blocks} blocks"
    if plan.local_reason is not None:
        return f"computed there: {plan.local_reason.value.replace('_', ' ')}"
    choice = plan.choice
    if choice is None:
        return "the only way"
    hits = max(choice.num_decode_hits, choice.num_prefill_hits)
    ways = int(np.count_nonzero(choice.offer.ways))
    return f"best of {ways} ways" + (f", {hits} blocks cached" if hits else "") if ways > 1 else "the only way"


def _attempt(number: int, plan: Plan, num_tokens: int, leader: str) -> AttemptTold:
    choice = plan.choice
    told = AttemptTold(
        attempt=number,
        decode=plan.decode.name,
        prefill=plan.prefill.name,
        spare=plan.spare.name if plan.spare else None,
        encode=plan.encode.name if plan.encode else None,
        encode_spare=plan.encode_spare.name if plan.encode_spare else None,
        local_reason=plan.local_reason,
        follows=leader or None,
        fetches_from=plan.holding.holder.name if plan.holding else None,
        held_blocks=plan.holding.num_blocks if plan.holding else 0,
        num_tokens=num_tokens,
        block_size=choice.offer.demand.block_size if choice else 0,
        num_ways=int(np.count_nonzero(choice.offer.ways)) if choice else 0,
    )
    return told if choice is None else replace(told, ways=_ways(choice), candidates=_candidates(choice))


def _ways(choice: Choice) -> tuple[WayTold, ...]:
    offer, costs = choice.offer, choice.costs
    total = np.where(offer.ways, 0.0 if costs is None else costs.total, inf)
    chosen = choice.row * total.shape[1] + choice.column
    order = [int(way) for way in total.argsort(axis=None, kind="stable")]
    shown = [way for way in order[:MAX_WAYS] if way != chosen and np.isfinite(total.flat[way])]
    return tuple(_way(choice, *divmod(way, total.shape[1])) for way in (chosen, *shown))


def _way(choice: Choice, row: int, column: int) -> WayTold:
    offer = choice.offer
    is_local = column == offer.ways.shape[1] - 1
    way = WayTold(
        decode=offer.decode(row).name,
        prefill=None if is_local else offer.candidates[offer.pairing.sources[column]].name,
        chosen=(row, column) == (choice.row, choice.column),
    )
    if choice.costs is None:
        return way
    prefill, queue, decode, transfer = (float(term[row, column]) for term in choice.costs)
    return replace(
        way,
        prefill_blocks=prefill,
        queue_blocks=queue,
        decode_blocks=decode,
        transfer_blocks=transfer,
        total_blocks=prefill + queue + decode + transfer,
    )


def _candidates(choice: Choice) -> tuple[CandidateTold, ...]:
    offer = choice.offer
    hits = offer.demand.hit_blocks
    return tuple(
        CandidateTold(
            name=candidate.name,
            incarnation=candidate.incarnation,
            shard=candidate.shard,
            num_requests=candidate.num_requests,
            queued_tokens=candidate.queued_tokens,
            hit_blocks=0 if hits is None else int(hits[index]),
        )
        for index, candidate in enumerate(offer.candidates)
    )


def _outcome(route: pb.Route) -> OutcomeTold:
    return OutcomeTold(
        decode=route.decode.name,
        prefill=route.prefill.name or None,
        local_prefill=route.local_prefill,
        decode_prefix_hit_tokens=route.decode_prefix_hit_tokens,
        prefill_prefix_hit_tokens=route.prefill_prefix_hit_tokens,
        recomputed_tokens=route.recomputed_tokens,
        skipped_blocks=route.skipped_blocks,
        fetched_from=route.fetched.holder.name or None,
        fetched_blocks=route.fetched.blocks,
        fetched_bytes=route.fetched.bytes,
        fetch_ms=1000 * route.fetched.seconds,
        blocks=route.blocks,
        bytes=route.bytes,
        transfer_ms=1000 * route.transfer_s,
        queue_ms=1000 * route.queue_s,
        prefill_ms=1000 * route.prefill_s,
        preemptions=route.preemptions,
        spare_used=bool(route.spare_used),
        encoded_by=route.encoded.encode.name or None,
        encoder_tokens=route.encoded.tokens,
        encoded_blocks=route.encoded.blocks,
        encoded_bytes=route.encoded.bytes,
        encode_ms=1000 * route.encoded.seconds,
        encoders_lost=route.encoded.lost,
    )

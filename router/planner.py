"""From what the router sees to a plan, or to why there is none. Pure, but for the policy's state and a kept pairing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from cluster.config import Role
from router.holding import with_holding
from router.offer import Choice, Demand, Offer, Policy
from router.pairing import Mask, Pairing
from router.plan import Candidate, LocalPrefill, LocalReason, NoPlan, Plan

_NO_DEMAND = Demand()


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRules:
    """When a decode worker computes a prompt itself; see router/plan.py."""

    mode: LocalPrefill
    max_tokens: int = 0  # conditional: so many uncached tokens are few
    saturated_tokens: int = 0  # conditional: a source with so many queued tokens has too much to do

    def reason(self, offer: Offer, row: int, *, bound: bool) -> LocalReason:
        """Why decode worker `row` may compute the prompt itself."""
        if bound:
            return LocalReason.CONFIGURED
        if not offer.rates.readable[row].any():
            return LocalReason.NO_SOURCE
        return LocalReason.SHORT if self.short(offer)[row] else LocalReason.SATURATED

    def short(self, offer: Offer) -> Mask:
        """[m]: little is left to compute there."""
        demand = offer.demand
        hits = offer.reusable[offer.pairing.decodes] * (not demand.computes_all)
        return np.asarray(demand.num_tokens - hits * demand.block_size <= self.max_tokens)

    def saturated(self, offer: Offer) -> Mask:
        """[m]: every source that it can read has too much to do."""
        queued = offer.loads.queued_tokens[offer.pairing.sources]
        return ~np.asarray((offer.rates.readable & (queued < self.saturated_tokens)).any(axis=1), np.bool_)


def make_plan(
    candidates: Sequence[Candidate],
    policy: Policy,
    *,
    local: LocalRules,
    want_spare: bool,
    excluded: Collection[str] = (),
    shunned: Collection[str] = (),
    demand: Demand = _NO_DEMAND,
    pairing: Pairing | None = None,
) -> Plan | NoPlan:
    """`excluded` incarnations are not chosen for decode; `shunned` ones only when there is no other. `pairing`: of
    these candidates, where the caller has it."""
    pairing = pairing or Pairing(candidates)
    opening = pairing.opening(local.mode)
    if excluded or shunned:
        allowed = opening.usable & ~pairing.rows(candidates, excluded)
        rows = allowed & ~pairing.rows(candidates, shunned)
        opening = opening.narrowed(rows if rows.any() else allowed)
    if opening.is_empty:
        return _explain(candidates, bool(pairing.serving), bool(opening.usable.any()))
    ways, barriers = opening.ways, opening.barriers
    if local.mode == "conditional":
        ways, barriers = ways.copy(), barriers.copy()
    offer = Offer.of(candidates, pairing, ways, demand, barriers)
    if local.mode == "conditional":
        alone = opening.rows & (local.short(offer) | local.saturated(offer))
        ways[alone, -1], barriers[alone, -1] = True, 0.0
    return with_holding(_planned(policy.choose(offer), local, opening.bound, want_spare=want_spare))


def _planned(choice: Choice, local: LocalRules, bound: Mask, *, want_spare: bool) -> Plan:
    offer, row = choice.offer, choice.row
    decode = offer.decode(row)
    if choice.is_local:
        reason = local.reason(offer, row, bound=bool(bound[row]))
        return Plan(decode=decode, prefill=decode, local_prefill_allowed=True, local_reason=reason, choice=choice)
    prefill = offer.candidates[choice.computing]
    spare = _spare(choice, prefill) if want_spare else None
    may_compute = local.mode != "never"
    return Plan(decode=decode, prefill=prefill, spare=spare, local_prefill_allowed=may_compute, choice=choice)


def _spare(choice: Choice, prefill: Candidate) -> Candidate | None:
    """The source with the least to do after `prefill`; of equals the next by name. Takes no turn of the policy."""
    offer = choice.offer
    queued = offer.pairing.of_sources(offer.loads.queued_tokens) + offer.barriers[choice.row, :-1]
    queued[choice.column] = inf
    least = queued.item(int(queued.argmin()))
    if least == inf:
        return None
    equal = [offer.candidates[offer.pairing.supplying[column]] for column in (queued == least).nonzero()[0].tolist()]
    if len(equal) == 1:
        return equal[0]
    return min(equal, key=lambda c: (c.num_requests, c.name < prefill.name, c.name))


def _explain(candidates: Sequence[Candidate], serving: bool, usable: bool) -> NoPlan:
    if usable:
        return NoPlan("every decode worker has turned the request away", exhausted=True)
    if serving:
        return NoPlan("no prefill worker is warm for any decode worker, and router.local_prefill is never")
    if any(Role.DECODE in c.roles for c in candidates):
        return NoPlan("no session to any decode worker is open")
    return NoPlan("no decode worker is ready")

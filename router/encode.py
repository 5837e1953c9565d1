"""Which worker reads the encoder input of a request, once it is known who runs its decoder. Pure.

    an encode worker whose output can be read wherever the decoder runs; it costs what waits there, and the input itself
    unless it has the output, or nobody has and it is the input's home
    else the worker that computes the decoder prompt

The home of an input is the same for every router, so equal inputs meet in one cache; when a worker leaves or comes,
only inputs of its own move.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from cluster.config import Role
from router.plan import Candidate, Plan
from router.policy import at_home


@dataclass(frozen=True, slots=True)
class EncoderDemand:
    """What is known of an input when its request is placed."""

    name: str  # the same for equal inputs that may share an output
    num_tokens: int
    holders: Collection[str] = ()  # incarnations that have the output


def with_encode(
    plan: Plan, candidates: Sequence[Candidate], demand: EncoderDemand, avoided: Collection[str] = ()
) -> Plan:
    """The same plan, with its encode stage. `avoided` incarnations are chosen when there is no other."""
    prefill = plan.prefill
    encoders = [each for each in candidates if Role.ENCODE in each.roles and _serves(each, plan)]
    encoders = [each for each in encoders if each.incarnation not in avoided] or encoders
    if not encoders:
        return replace(
            plan, encode=prefill, encode_spare=plan.spare, num_encoder_tokens=_num_read(plan, prefill, demand)
        )
    having = {each.incarnation for each in encoders if each.incarnation in demand.holders}
    homes = having or {at_home(demand.name, encoders).incarnation}

    def cost(each: Candidate) -> tuple[int, bool, int, str]:
        away = each.incarnation not in homes
        return each.queued_encoder_tokens + demand.num_tokens * away, away, each.num_requests, each.name

    first, *others = sorted(encoders, key=cost)
    spare = others[0] if others else None
    return replace(plan, encode=first, encode_spare=spare, num_encoder_tokens=_num_read(plan, first, demand))


def _num_read(plan: Plan, encode: Candidate, demand: EncoderDemand) -> int:
    """Tokens that `encode` reads: none where it has the output, or nobody asks for it."""
    held = {each.incarnation in demand.holders for each in (plan.prefill, plan.decode)} == {True}
    return 0 if held or encode.incarnation in demand.holders else demand.num_tokens


def is_read_apart(plan: Plan, candidates: Sequence[Candidate]) -> bool:
    """Whether an encode worker could read an input for whoever runs the decoder."""
    return any(Role.ENCODE in each.roles and _serves(each, plan) for each in candidates)


def _serves(encoder: Candidate, plan: Plan) -> bool:
    """Whether its output can be read where the decoder runs. A worker reads what it has itself."""
    runs = {plan.prefill.incarnation: plan.prefill, plan.decode.incarnation: plan.decode}
    return all(
        encoder.incarnation == incarnation
        or (
            encoder.incarnation in each.warm_sources
            and encoder.compatibility_hash == each.compatibility_hash
            and encoder.connected
        )
        for incarnation, each in runs.items()
    )

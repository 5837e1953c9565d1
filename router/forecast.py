"""When a request's first token may be expected, from what the workers last reported. Pure.

It is the least of what the sources promise: the prompt tokens that wait there, those just sent included, and the
request's own, at the rate measured there. A source that has measured nothing yet promises nothing, and nobody is
turned away for its sake.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from cluster.config import Role
from router.plan import Candidate

_BURST_S: Final = 0.1


class Outlook(NamedTuple):
    """Of one request. The default: nobody can tell."""

    first_token_s: float = 0.0
    num_tokens: int = 0  # to be computed for it
    tokens_per_s: float = 0.0  # of all sources together


def outlook(num_tokens: int, candidates: Iterable[Candidate]) -> Outlook:
    """`num_tokens`: those of the prompt that nobody has cached."""
    known = list(candidates)
    sources = [each for each in known if Role.PREFILL in each.roles] or known
    if not sources or any(each.prefill_tokens_per_s <= 0 for each in sources):
        return Outlook()
    first_token_s = min((each.queued_tokens + num_tokens) / each.prefill_tokens_per_s for each in sources)
    return Outlook(first_token_s, num_tokens, sum(each.prefill_tokens_per_s for each in sources))


class Pace:
    """How much of the room that is left one of several replicas takes: a bucket of tokens.

    Replicas hear of a free place at the same time, and each would take it; then none takes any until that is worked
    off. So the less room is left, the slower the bucket fills: with its part of what the sources do, times a gain that
    is 1 at three quarters of the time that a request has, 0 at its end, and without bound at half of it, where a
    replica that has all the load to itself may take it all. Balanced load rests where the gain is 1; the slope there,
    -8, times the age of a report is far below the time that requests have, so nothing swings.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._filled_at = 0.0

    def allows(self, tokens_per_s: float, used: float, now: float) -> bool:
        """`tokens_per_s`: the replica's part. `used`: of the time that the request has, 0 … 1. What a long prompt cost
        more than there was is owed, and worked off first."""
        if used <= 0.5:
            return True
        rate = tokens_per_s * max(0.0, 1 - used) / (used - 0.5)
        self._tokens = min(self._tokens + (now - self._filled_at) * rate, _BURST_S * rate)
        self._filled_at = now
        return self._tokens >= 0

    def spend(self, num_tokens: int) -> None:
        self._tokens -= num_tokens

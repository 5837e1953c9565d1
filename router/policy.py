"""How one worker is chosen among those that fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from cluster.config import Role
from router.plan import Candidate, Policy


class RoundRobin:
    """In turn, by name, whatever the load; each stage has its own turn."""

    def __init__(self) -> None:
        self._last: dict[Role, tuple[str, str, int]] = {}

    def pick(self, stage: Role, candidates: Sequence[Candidate]) -> Candidate:
        ordered = sorted(candidates, key=_identity)
        last = self._last.get(stage)
        chosen = next((c for c in ordered if last is not None and _identity(c) > last), ordered[0])
        self._last[stage] = _identity(chosen)
        return chosen


class LeastLoaded:
    """Fewest requests for decode, fewest queued prompt tokens for prefill; equal ones in turn."""

    def __init__(self) -> None:
        self._turns = RoundRobin()

    def pick(self, stage: Role, candidates: Sequence[Candidate]) -> Candidate:
        least = min(_load(stage, c) for c in candidates)
        return self._turns.pick(stage, [c for c in candidates if _load(stage, c) == least])


POLICIES: Final[Mapping[str, Callable[[], Policy]]] = MappingProxyType(
    {"round_robin": RoundRobin, "least_loaded": LeastLoaded}
)


def _load(stage: Role, candidate: Candidate) -> tuple[int, int]:
    requests, tokens = candidate.num_requests, candidate.queued_tokens
    return (requests, tokens) if stage is Role.DECODE else (tokens, requests)


def _identity(candidate: Candidate) -> tuple[str, str, int]:
    return candidate.name, candidate.incarnation, candidate.shard

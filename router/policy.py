"""How one worker is chosen among those that fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from random import Random
from types import MappingProxyType
from typing import Final

import numpy as np

from cluster.config import Role, RouterConfig
from router.cost import Weights, costs_of, total_of
from router.offer import Choice, Offer, Policy
from router.plan import Candidate

_EQUAL: Final = 1e-9  # blocks: costs that differ by less are the same


class _Staged(ABC):
    """The decode worker first, whatever its sources; then a source, unless the worker may compute the prompt itself.
    Requests of one session go where the session is."""

    @abstractmethod
    def pick(self, stage: Role, candidates: Sequence[Candidate]) -> Candidate:
        """One of `candidates`, which are not empty."""

    def choose(self, offer: Offer) -> Choice:
        rows = np.flatnonzero(offer.ways.any(axis=1))
        session = offer.demand.session
        decodes = [offer.decode(int(row)) for row in rows]
        decode = at_home(session, decodes) if session else self.pick(Role.DECODE, decodes)
        row = int(rows[decodes.index(decode)])
        if offer.ways[row, -1]:
            return Choice(offer, row, offer.ways.shape[1] - 1)
        columns, sources = np.flatnonzero(offer.ways[row, :-1]), offer.sources(row)
        source = at_home(session, sources) if session else self.pick(Role.PREFILL, sources)
        return Choice(offer, row, int(columns[sources.index(source)]))


class RoundRobin(_Staged):
    """In turn, by name, whatever the load; each stage has its own turn."""

    def __init__(self) -> None:
        self._last: dict[Role, tuple[str, str, int]] = {}

    def pick(self, stage: Role, candidates: Sequence[Candidate]) -> Candidate:
        ordered = sorted(candidates, key=_identity)
        last = self._last.get(stage)
        chosen = next((c for c in ordered if last is not None and _identity(c) > last), ordered[0])
        self._last[stage] = _identity(chosen)
        return chosen


class LeastLoaded(_Staged):
    """Fewest requests for decode, fewest queued prompt tokens for prefill; equal ones in turn."""

    def __init__(self) -> None:
        self._turns = RoundRobin()

    def pick(self, stage: Role, candidates: Sequence[Candidate]) -> Candidate:
        least = min(_load(stage, c) for c in candidates)
        return self._turns.pick(stage, [c for c in candidates if _load(stage, c) == least])


class KvAware:
    """The pair that costs the fewest blocks of work, of all pairs. Equal ones: who waited longest for a turn.

    `temperature` 0 takes the cheapest; above it, a way is drawn with a probability that falls e-fold with every
    `temperature` blocks that it costs more. A session stays with its worker unless another one is more than
    `affinity_blocks` cheaper.
    """

    def __init__(
        self,
        *,
        prefill_weight: float = 1.0,
        decode_weight: float = 1.0,
        temperature: float = 0.0,
        affinity_blocks: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._weights = Weights(prefill_weight, decode_weight)
        self._count = partial(costs_of, weights=self._weights)
        self._temperature = temperature
        self._affinity_blocks = affinity_blocks
        self._random = Random(seed)
        self._turn = 0
        self._turns: dict[tuple[Role, str, int], int] = {}  # when each worker was last chosen

    def choose(self, offer: Offer) -> Choice:
        total = total_of(offer, self._weights)
        total += offer.barriers
        least = total.item(int(total.argmin()))
        way = self._home(offer, total, least) if offer.demand.session else None
        if way is None:
            way = self._draw(total, least) if self._temperature else self._cheapest(offer, total, least)
        choice = Choice(offer, *way, self._count)
        self._take_turn(choice)
        return choice

    def _home(self, offer: Offer, total: np.ndarray, least: float) -> tuple[int, int] | None:
        """Of the session's decode worker, the way through the session's source, or else the cheapest."""
        session = offer.demand.session
        rows = np.flatnonzero(offer.ways.any(axis=1))
        decodes = [offer.decode(int(row)) for row in rows]
        row = int(rows[decodes.index(at_home(session, decodes))])
        columns = [int(total[row].argmin())]
        if sources := offer.sources(row):
            home = sources.index(at_home(session, sources))
            columns.insert(0, int(np.flatnonzero(offer.ways[row, :-1])[home]))
        near = (column for column in columns if total[row, column] - least <= self._affinity_blocks)
        return next(((row, column) for column in near), None)

    def _draw(self, total: np.ndarray, least: float) -> tuple[int, int]:
        weights = np.exp((least - total) / self._temperature).cumsum()
        drawn = int(weights.searchsorted(self._random.random() * weights[-1], side="right"))
        return divmod(min(drawn, total.size - 1), total.shape[1])

    def _cheapest(self, offer: Offer, total: np.ndarray, least: float) -> tuple[int, int]:
        equal = (total.reshape(-1) <= least + _EQUAL).nonzero()[0]
        if len(equal) > 1:
            pairing, candidates = offer.pairing, offer.candidates
            decoded = np.array([self._last(Role.DECODE, candidates[i]) for i in pairing.decodes])
            filled = np.array([*(self._last(Role.PREFILL, candidates[i]) for i in pairing.sources), 0])
            rows, columns = np.divmod(equal, total.shape[1])
            equal = equal[np.lexsort((filled[columns], decoded[rows]))]
        return divmod(int(equal[0]), total.shape[1])

    def _last(self, stage: Role, candidate: Candidate) -> int:
        return self._turns.get((stage, candidate.incarnation, candidate.shard), 0)

    def _take_turn(self, choice: Choice) -> None:
        self._turn += 1
        offer = choice.offer
        chosen = [(Role.DECODE, offer.decode(choice.row))]
        if not choice.is_local:
            chosen.append((Role.PREFILL, offer.candidates[choice.computing]))
        if len(self._turns) > 4 * len(offer.candidates) + len(chosen):  # of workers that are gone
            self._turns = {key: turn for key, turn in self._turns.items() if self._turn - turn < len(self._turns)}
        for stage, candidate in chosen:
            self._turns[stage, candidate.incarnation, candidate.shard] = self._turn


POLICIES: Final[Mapping[str, Callable[[RouterConfig], Policy]]] = MappingProxyType(
    {
        "round_robin": lambda _: RoundRobin(),
        "least_loaded": lambda _: LeastLoaded(),
        "kv_aware": lambda config: KvAware(
            prefill_weight=config.prefill_weight,
            decode_weight=config.decode_weight,
            temperature=config.temperature,
            affinity_blocks=config.affinity_blocks,
        ),
    }
)


def at_home(session: str, candidates: Sequence[Candidate]) -> Candidate:
    """The same for every router: the highest score of (session, worker). When a worker leaves, only its sessions
    move; when one comes, only those that move to it."""

    def score(candidate: Candidate) -> bytes:
        return blake2b(f"{session}\0{candidate.name}\0{candidate.shard}".encode(), digest_size=8).digest()

    return max(candidates, key=score)


def _load(stage: Role, candidate: Candidate) -> tuple[int, int]:
    requests, tokens = candidate.num_requests, candidate.queued_tokens
    return (requests, tokens) if stage is Role.DECODE else (tokens, requests)


def _identity(candidate: Candidate) -> tuple[str, str, int]:
    return candidate.name, candidate.incarnation, candidate.shard

"""Which decode worker can read from which source, and how fast: kept from plan to plan, since it rarely changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cluster.config import Role
from router.plan import Candidate

Mask: TypeAlias = NDArray[np.bool_]
Floats: TypeAlias = NDArray[np.float64]


class Pairing:
    """Of one list of candidates. m decode workers stand for rows, n sources for columns; `decodes` and `sources` are
    their indices in the list."""

    __slots__ = ("_identity", "_rates", "bytes_per_s", "decodes", "nobody_prefills", "readable", "serving", "sources")

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._identity = _identity(candidates)
        serving = [i for i, c in enumerate(candidates) if Role.DECODE in c.roles and c.connected]
        sources = [i for i, c in enumerate(candidates) if Role.PREFILL in c.roles and c.connected]
        self.decodes: NDArray[np.int64] = np.array(serving, np.int64)
        self.sources: NDArray[np.int64] = np.array(sources, np.int64)
        self.serving = serving
        self.nobody_prefills = all(Role.PREFILL not in c.roles for c in candidates)
        self.bytes_per_s: Floats = np.zeros((len(serving), len(sources)))
        self.readable: Mask = np.zeros((len(serving), len(sources)), np.bool_)
        self._rates: list[Mapping[str, float] | None] = [None] * len(serving)
        self._read_rates(candidates)

    def fits(self, candidates: Sequence[Candidate]) -> bool:
        """Whether this is the pairing of these candidates; rates that changed are taken over."""
        if self._identity != _identity(candidates):
            return False
        self._read_rates(candidates)
        return True

    def _read_rates(self, candidates: Sequence[Candidate]) -> None:
        for row, index in enumerate(self.serving):
            decode = candidates[index]
            if self._rates[row] is decode.warm_sources:
                continue
            self._rates[row] = decode.warm_sources
            for column, source in enumerate(candidates[index] for index in self.sources):
                rate = decode.warm_sources.get(source.incarnation)
                readable = rate is not None and source.incarnation != decode.incarnation
                readable = readable and source.compatibility_hash == decode.compatibility_hash
                self.readable[row, column] = readable
                self.bytes_per_s[row, column] = rate or 0.0

    def rows(self, candidates: Sequence[Candidate], incarnations: Collection[str]) -> Mask:
        """[m]: the decode workers among `incarnations`."""
        return np.array([candidates[index].incarnation in incarnations for index in self.serving], np.bool_)


def _identity(candidates: Sequence[Candidate]) -> list[tuple[str, int, bool]]:
    """What makes another pairing, apart from rates; roles and compatibility hash are an incarnation's for life."""
    return [(c.incarnation, c.shard, c.connected) for c in candidates]

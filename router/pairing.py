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
    their indices in the list, `serving` and `supplying` the same as plain numbers."""

    __slots__ = ("_rates", "decodes", "nobody_prefills", "readable", "s_per_byte", "serving", "sources", "supplying")

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        serving = [i for i, c in enumerate(candidates) if Role.DECODE in c.roles and c.connected]
        sources = [i for i, c in enumerate(candidates) if Role.PREFILL in c.roles and c.connected]
        self.decodes: NDArray[np.int64] = np.array(serving, np.int64)
        self.sources: NDArray[np.int64] = np.array(sources, np.int64)
        self.serving = serving
        self.supplying = sources
        self.nobody_prefills = all(Role.PREFILL not in c.roles for c in candidates)
        self.s_per_byte: Floats = np.zeros((len(serving), len(sources)))
        self.readable: Mask = np.zeros((len(serving), len(sources)), np.bool_)
        self._rates: list[Mapping[str, float] | None] = [None] * len(serving)
        self.read_rates(candidates)

    def read_rates(self, candidates: Sequence[Candidate]) -> None:
        """Of the same candidates in the same order: takes over what changed."""
        for row, index in enumerate(self.serving):
            decode = candidates[index]
            if self._rates[row] is decode.warm_sources:
                continue
            self._rates[row] = decode.warm_sources
            for column, source in enumerate(candidates[index] for index in self.supplying):
                rate = decode.warm_sources.get(source.incarnation)
                readable = rate is not None and source.incarnation != decode.incarnation
                readable = readable and source.compatibility_hash == decode.compatibility_hash
                self.readable[row, column] = readable
                self.s_per_byte[row, column] = 1 / rate if rate else 0.0

    def rows(self, candidates: Sequence[Candidate], incarnations: Collection[str]) -> Mask:
        """[m]: the decode workers among `incarnations`."""
        return np.array([candidates[index].incarnation in incarnations for index in self.serving], np.bool_)

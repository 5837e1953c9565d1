"""What a policy chooses from, and what it chose: plain values with an array each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from router.holding import spared_blocks
from router.outputs import OutputDemand, OutputWork
from router.pairing import Floats, Loads, Mask, Pairing, Rates, barriers
from router.plan import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is known of a request when it is placed."""

    num_tokens: int = 0  # prompt and emitted
    block_size: int = 1
    hit_blocks: NDArray[np.int64] | None = None  # of each candidate: full blocks that it has, from the first one on
    computes_all: bool = False  # every position is computed, whatever is cached
    may_fetch: bool = True  # from a worker that holds what the computing one lacks
    output: OutputDemand | None = None  # of an encoder
    session: str = ""  # requests of one session go to one worker; "": no session


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """`ways[row, column]`: decode worker `row` of the pairing may serve, with source `column`; in the last column, by
    computing the prompt itself. At least one is True. Loads and rates are those of this moment."""

    candidates: Sequence[Candidate]
    pairing: Pairing
    ways: Mask
    barriers: Floats  # of these ways; see router/pairing.py
    demand: Demand
    reusable: NDArray[np.int64]  # of each candidate, blocks of the request that it need not compute
    spared: (
        Floats  # of each candidate: those, and what it gains by fetching rather than computing; see router/holding.py
    )
    loads: Loads
    rates: Rates
    output: OutputWork | None = None

    @classmethod
    def of(
        cls,
        candidates: Sequence[Candidate],
        pairing: Pairing,
        ways: Mask,
        demand: Demand,
        closed: Floats | None = None,
    ) -> Offer:
        """`closed`: the barriers, where the caller has them.

        What comes after the last whole block is always computed, and is at least a token."""
        output = demand.output
        hit_blocks = np.zeros(len(candidates), np.int64) if demand.hit_blocks is None else demand.hit_blocks
        reusable = np.minimum(hit_blocks, max(0, demand.num_tokens - 1) // demand.block_size)
        return cls(
            candidates=candidates,
            pairing=pairing,
            ways=ways,
            barriers=barriers(ways) if closed is None else closed,
            demand=demand,
            reusable=reusable,
            spared=(
                spared_blocks(reusable, demand.block_size, pairing) if demand.may_fetch else reusable.astype(np.float64)
            ),
            loads=pairing.loads,
            rates=pairing.rates,
            output=None if output is None else OutputWork.of(output, candidates, pairing, demand.block_size),
        )

    def decode(self, row: int) -> Candidate:
        return self.candidates[self.pairing.serving[row]]

    def sources(self, row: int) -> list[Candidate]:
        """That it may use."""
        return [self.candidates[self.pairing.supplying[column]] for column in self.ways[row, :-1].nonzero()[0]]


class Costs(NamedTuple):
    """In blocks of prefill work that the request waits for, [m, n + 1] each; the last column is for computing the
    prompt on the decode worker."""

    prefill: Floats  # left to compute after what is cached
    queue: Floats  # to be computed there before
    decode: Floats  # what the decode worker has to do, and blocks that it has to wait for
    transfer: Floats  # moving the missing blocks, in blocks that the source computes meanwhile

    @property
    def total(self) -> Floats:
        return self.prefill + self.queue + self.decode + self.transfer


@dataclass(frozen=True, slots=True)
class Choice:
    offer: Offer
    row: int
    column: int  # n: the decode worker computes the prompt
    count: Callable[[Offer], Costs] | None = None  # of a policy that goes by costs

    @property
    def costs(self) -> Costs | None:
        """Term by term, counted when somebody asks."""
        return self.count(self.offer) if self.count is not None else None

    @property
    def is_local(self) -> bool:
        return self.column == self.offer.ways.shape[1] - 1

    @property
    def computing(self) -> int:
        """Whose index among the candidates is that of the worker that computes the prompt."""
        pairing = self.offer.pairing
        return pairing.serving[self.row] if self.is_local else pairing.supplying[self.column]

    @property
    def num_decode_hits(self) -> int:
        """Blocks that the decode worker need not be sent."""
        return int(self.offer.reusable[self.offer.pairing.decodes[self.row]])

    @property
    def num_prefill_hits(self) -> int:
        """Blocks that need not be computed."""
        if self.offer.demand.computes_all:
            return 0
        if self.is_local:
            return self.num_decode_hits
        return int(self.offer.reusable[self.offer.pairing.sources[self.column]])


class Policy(Protocol):
    """Implementations may keep state; one per router, its loop's thread only."""

    def choose(self, offer: Offer) -> Choice: ...

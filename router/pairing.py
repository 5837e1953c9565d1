"""Which decode worker can read from which source, how fast, and what each has to do: kept from plan to plan, since most
of it is the same in the next one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import compress
from math import inf
from operator import is_not, itemgetter
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cluster.config import Role
from router.plan import Candidate, LocalPrefill

FAR: Final = 1e18  # tokens: more than there are
ASK_S: Final = 0.005  # an ask finds the holder in the middle of a step, and its answer must be read

Mask: TypeAlias = NDArray[np.bool_]
Floats: TypeAlias = NDArray[np.float64]


class Loads(NamedTuple):
    """Of each candidate, [k] each. Nobody writes into them: what changes is another Loads."""

    queued_tokens: Floats
    num_requests: Floats
    num_available_blocks: Floats  # inf: not told
    block_bytes: Floats
    tokens_per_s: Floats  # prefill; 0: not measured


class Rates(NamedTuple):
    """Of each decode worker m and source n, [m, n] each. Nobody writes into them."""

    readable: Mask  # by that decode worker, now
    s_per_byte: Floats  # 0: not measured


class PerBlock(NamedTuple):
    """Rates in blocks of prompt that are computed meanwhile. Nobody writes into them."""

    transfer: Floats  # [m, n + 1]: by the source, for each block that moves; 0: not measured, or nothing moves
    gain: Floats  # [k, k]: that candidate j need not compute for one that it fetches from i; far below 0: it cannot
    ask: Floats  # [k]: by a candidate that asks for blocks, once


class Opening(NamedTuple):
    """What there is to choose from in one mode of `local_prefill`, whatever the request. Nobody writes into it."""

    bound: Mask  # [m]: computes prompts itself because the configuration says so
    remote: Mask  # [m, n]
    usable: Mask  # [m]
    rows: Mask  # [m]: of them, the better ones
    ways: Mask  # [m, n + 1] of these rows; the last column: computing the prompt there, for want of a source
    barriers: Floats  # [m, n + 1]: see `barriers`
    is_empty: bool  # no way at all

    def narrowed(self, rows: Mask) -> Opening:
        """To the better ones of `rows`. A remote source, or the local one that the configuration asks for, is better
        than a fallback."""
        has_source = np.asarray(self.remote.any(axis=1), np.bool_)
        better = rows & (has_source | self.bound)
        rows = better if better.any() else rows
        ways = np.column_stack((self.remote & rows[:, None], rows & ~has_source))
        return self._replace(rows=rows, ways=ways, barriers=barriers(ways), is_empty=not rows.any())


class Pairing:
    """Of one list of candidates. m decode workers stand for rows, n sources for columns; `decodes` and `sources` are
    their indices in the list, `serving` and `supplying` the same as plain numbers, `of_decodes` and `of_sources` pick
    their values out of an array of all candidates."""

    __slots__ = (
        "_fetch_tokens",
        "_openings",
        "_per_block",
        "_prefills",
        "_reach",
        "_seen",
        "_table",
        "decodes",
        "loads",
        "of_decodes",
        "of_sources",
        "rates",
        "serving",
        "sources",
        "supplying",
    )

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        serving = [i for i, c in enumerate(candidates) if Role.DECODE in c.roles and c.connected]
        sources = [i for i, c in enumerate(candidates) if Role.PREFILL in c.roles and c.connected]
        shape = len(serving), len(sources)
        self.decodes: NDArray[np.int64] = np.array(serving, np.int64)
        self.sources: NDArray[np.int64] = np.array(sources, np.int64)
        self.serving = serving
        self.supplying = sources
        self.of_decodes = _picker(serving)
        self.of_sources = _picker(sources)
        nobody_prefills = all(Role.PREFILL not in c.roles for c in candidates)
        self._prefills = np.array(
            [nobody_prefills or Role.PREFILL in candidates[index].roles for index in serving], np.bool_
        )
        self._table = np.zeros((len(Loads._fields), len(candidates)))  # rows of `loads`
        self.loads = Loads(*self._table)
        self._reach: Floats = np.full((len(candidates), len(candidates)), inf)  # seconds per byte
        self._fetch_tokens: Floats = np.full_like(self._reach, FAR)  # [i, j]: that i computes while it fetches a block
        self._per_block: tuple[int, PerBlock] | None = None  # block size
        self.rates = Rates(np.zeros(shape, np.bool_), np.zeros(shape))
        self._seen: list[Candidate | None] = [None] * len(candidates)
        self._openings: dict[LocalPrefill, Opening] = {}
        self.read(candidates)

    def read(self, candidates: Sequence[Candidate]) -> None:
        """Of the same workers in the same order: takes over what changed."""
        seen = self._seen
        changed = list(compress(range(len(seen)), map(is_not, candidates, seen)))
        if not changed:
            return
        self._table = self._table.copy()
        queued_tokens, num_requests, num_available_blocks, block_bytes, tokens_per_s = self.loads = Loads(*self._table)
        slower, other = False, []
        for index in changed:
            now, before = candidates[index], seen[index]
            queued_tokens[index] = now.queued_tokens
            num_requests[index] = now.num_requests
            num_available_blocks[index] = inf if now.num_available_blocks is None else now.num_available_blocks
            if before is None or (before.block_bytes, before.prefill_tokens_per_s) != (
                now.block_bytes,
                now.prefill_tokens_per_s,
            ):
                block_bytes[index], tokens_per_s[index] = now.block_bytes, now.prefill_tokens_per_s
                slower = True
            if before is None or before.warm_sources is not now.warm_sources:
                other.append(index)
        self._seen = list(candidates)
        if slower or other:
            self._read_rates(candidates, set(other))

    def _read_rates(self, candidates: Sequence[Candidate], other: Collection[int]) -> None:
        """`other`: whose warm sources are not those of before."""
        reach = self._reach
        for index in other:
            sink = candidates[index]
            warm, incarnation, compatibility = sink.warm_sources, sink.incarnation, sink.compatibility_hash
            rates = [
                warm.get(source.incarnation)
                if source.incarnation != incarnation and source.compatibility_hash == compatibility
                else None
                for source in candidates
            ]
            reach[index] = [inf if rate is None else 1 / rate if rate else 0.0 for rate in rates]
        loads = self.loads
        tokens = (loads.block_bytes * loads.tokens_per_s)[:, None] * np.where(np.isfinite(reach), reach, 0.0)
        self._fetch_tokens = np.where(np.isfinite(reach), tokens, FAR)
        self._per_block = None
        pairs = reach[self.decodes[:, None], self.sources]
        readable = np.isfinite(pairs)
        s_per_byte = np.where(readable, pairs, 0.0)
        self._openings.clear()
        self.rates = Rates(readable, s_per_byte)

    def per_block(self, block_size: int) -> PerBlock:
        if self._per_block is None or self._per_block[0] != block_size:
            loads = self.loads
            transfer = np.zeros((len(self.serving), len(self.supplying) + 1))
            blocks_per_s = self.of_sources(loads.tokens_per_s) / block_size
            transfer[:, :-1] = self.of_decodes(loads.block_bytes)[:, None] * self.rates.s_per_byte * blocks_per_s
            gain = np.ascontiguousarray((1 - self._fetch_tokens / block_size).T)
            self._per_block = block_size, PerBlock(transfer, gain, loads.tokens_per_s * (ASK_S / block_size))
        return self._per_block[1]

    def opening(self, mode: LocalPrefill) -> Opening:
        opening = self._openings.get(mode)
        if opening is None:
            bound = self._prefills if mode == "always" else np.zeros_like(self._prefills)
            remote = self.rates.readable & ~bound[:, None]
            usable = np.asarray(remote.any(axis=1), np.bool_) | (mode != "never")
            whole = Opening(bound, remote, usable, usable, remote, barriers(remote), not usable.any())
            opening = self._openings[mode] = whole.narrowed(usable)
        return opening

    def rows(self, candidates: Sequence[Candidate], incarnations: Collection[str]) -> Mask:
        """[m]: the decode workers among `incarnations`."""
        return np.array([candidates[index].incarnation in incarnations for index in self.serving], np.bool_)


def barriers(ways: Mask) -> Floats:
    """What is added to the cost of each way, so that it is the cheapest only if it may be taken: 0 or inf."""
    return np.where(ways, 0.0, inf)


def _picker(indices: Sequence[int]) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Neighbours are picked as a view, which is quicker."""
    if indices and indices[-1] - indices[0] == len(indices) - 1:
        return itemgetter(slice(indices[0], indices[-1] + 1))
    chosen = np.array(indices, np.int64)
    return lambda values: values.take(chosen)

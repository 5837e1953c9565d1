"""Where requests go: from the fleet, what its caches hold, and the policy, to a plan; and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.config import RouterConfig
from cluster.hashing import chain_root
from cluster.log import Log
from cluster.metrics import Metrics
from router.block_feed import BlockFeed
from router.encode import EncoderDemand, with_encode
from router.fleet import Fleet
from router.flight import Flight
from router.holder_table import Keys
from router.offer import Demand
from router.outputs import OutputDemand, output_key
from router.pairing import Pairing
from router.plan import Candidate, NoPlan, Plan
from router.planner import LocalRules, make_plan
from router.policy import POLICIES
from router.predicted import mark
from router.prefix_index import keys_of, prefix_depths
from router.route_book import RouteBook


class Navigator:
    """The router's loop only. `now` is that loop's time."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        metrics: Metrics,
        log: Log,
        later: Callable[[Callable[[], None]], object],
        *,
        block_size: int,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._metrics = metrics
        self._block_size = block_size
        self._policy = POLICIES[config.policy](config)
        self._local = LocalRules(
            mode=config.local_prefill, max_tokens=config.local_max_tokens, saturated_tokens=config.saturated_tokens
        )
        self._seen = (-1, -1)  # generations of what the next three are made of
        self._pairing = Pairing(())
        self._seats = np.zeros(0, np.int64)  # of each candidate
        self._models: tuple[bytes, ...] = ()  # compatibility hashes
        self._roots: dict[bytes, bytes] = {}  # of hash chains without a salt, by compatibility hash
        self._last_keys = b"", keys_of(b"")  # of these hashes
        self.feed = BlockFeed(metrics, log, later)
        self.routes = RouteBook(config.policy, config.kept_routes)

    @property
    def uses_blocks(self) -> bool:
        """Whether it matters what caches hold."""
        return self._config.policy == "kv_aware" or self._config.local_prefill == "conditional"

    def any_plan(self) -> Plan | NoPlan:
        """Of a request that nothing is known of. Takes no turn of the policy."""
        candidates = self._candidates()
        return make_plan(
            candidates,
            POLICIES["least_loaded"](self._config),
            local=self._local,
            want_spare=False,
            pairing=self._pairing,
        )

    def plan(self, flight: Flight, now: float) -> Plan | NoPlan:
        candidates = self._candidates()
        request = flight.request
        output = self._output(candidates, flight, now) if self._reuses_output(flight) else None
        plan = make_plan(
            candidates,
            self._policy,
            local=self._local,
            want_spare=self._config.spare,
            excluded=flight.excluded,
            shunned=flight.shunned,
            demand=Demand(
                num_tokens=flight.num_tokens,
                block_size=self._block_size,
                hit_blocks=self._hits(candidates, flight, now) if self.uses_blocks else None,
                computes_all=request.sampling.needs_whole_prompt,
                may_fetch=request.sampling.pooling is None,  # a vector's prompt holds no reservation to fetch into
                output=output,
                session=request.session,
            ),
            pairing=self._pairing,
        )
        if isinstance(plan, NoPlan) or not request.encoder_token_ids:
            return plan
        holders = () if output is None else {candidates[index].incarnation for index in output.held.nonzero()[0]}
        wanted = EncoderDemand(self.root(plan.decode, flight).hex(), len(request.encoder_token_ids), holders)
        return with_encode(plan, candidates, wanted, flight.excluded | flight.shunned)

    def num_uncached(self, flight: Flight, now: float) -> int:
        """Tokens of the request that some worker has to compute at least."""
        if not self.uses_blocks or flight.request.sampling.needs_whole_prompt:
            return flight.num_tokens
        hits = self._hits(self._candidates(), flight, now)
        return max(1, flight.num_tokens - int(hits.max(initial=0)) * self._block_size)

    def placed(self, flight: Flight, plan: Plan, now: float, *, led: bool) -> None:
        """The request was sent: both workers have more to do, and will hold its blocks. `led`: the plan is that of
        the request that it follows, whose prompt is computed for both."""
        self._fleet.sent(plan.decode, num_requests=1)
        num_hits = 0 if plan.choice is None else plan.choice.num_prefill_hits
        if plan.holding is not None:
            num_hits = plan.holding.num_blocks
        self._fleet.sent(plan.prefill, num_tokens=0 if led else flight.num_tokens - num_hits * self._block_size)
        if plan.encode is not None and not led:
            self._fleet.sent(plan.encode, num_encoder_tokens=plan.num_encoder_tokens)
        self.routes.placed(flight, plan, leader=flight.request.leader_id if led else "")
        if plan.local_reason is not None:
            self._metrics.local_plans.labels(plan.local_reason).inc()
        if not self.uses_blocks:
            return
        root = self.root(plan.decode, flight)
        keys = self._keys(flight, root)
        seats = {self.feed.seat(worker.incarnation, worker.shard) for worker in (plan.decode, plan.prefill)}
        if len(keys):
            self.feed.predicted.add(seats - {-1}, keys, now)
        if self._reuses_output(flight) and plan.encode is not None:
            seats.add(self.feed.seat(plan.encode.incarnation, plan.encode.shard))
            key = output_key(root, len(flight.request.encoder_token_ids), self._block_size)
            self.feed.predicted.add(seats - {-1}, key, now)

    def ended(self, flight: Flight) -> None:
        """What was found in the caches of the last attempt, beside what was expected."""
        self.routes.ended(flight)
        plan, route = flight.plan, flight.route
        if plan is not None:
            self._fleet.ended(plan.decode)
        choice = plan.choice if plan is not None else None
        if choice is None or route is None or choice.offer.demand.hit_blocks is None or flight.request.leader_id:
            return
        expected, found = self._metrics.expected_hit_tokens, self._metrics.found_hit_tokens
        expected.labels("decode").inc(choice.num_decode_hits * self._block_size)
        found.labels("decode").inc(route.decode_prefix_hit_tokens)
        if not choice.is_local and not choice.offer.demand.computes_all:
            expected.labels("prefill").inc(choice.num_prefill_hits * self._block_size)
            found.labels("prefill").inc(route.prefill_prefix_hit_tokens)

    def root(self, worker: Candidate, flight: Flight) -> bytes:
        """Of the hash chain of the request there."""
        return self._root(worker.compatibility_hash, flight)

    def _root(self, compatibility: bytes, flight: Flight) -> bytes:
        own = flight.root(compatibility)
        if own is not None:
            return own
        if compatibility not in self._roots:
            self._roots[compatibility] = chain_root(compatibility)
        return self._roots[compatibility]

    def _candidates(self) -> list[Candidate]:
        candidates = self._fleet.candidates()
        seen = self._fleet.generation, self.feed.generation
        if seen != self._seen:
            self._seen = seen
            self._pairing = Pairing(candidates)
            self._seats = np.array([self.feed.seat(c.incarnation, c.shard) for c in candidates], np.int64)
            self._models = tuple({c.compatibility_hash: None for c in candidates})
        else:
            self._pairing.read(candidates)
        return candidates

    def _hits(self, candidates: Sequence[Candidate], flight: Flight, now: float) -> NDArray[np.int64]:
        """Of each candidate, the blocks of the request that it has, or will have soon, from the first one on."""
        return self._found(candidates, lambda root: self._keys(flight, root), flight, now)

    def _reuses_output(self, flight: Flight) -> bool:
        """Whether it matters who holds the output of its encoder. A vector is made of states, which nobody keeps."""
        return self.uses_blocks and bool(flight.request.encoder_token_ids) and flight.request.sampling.pooling is None

    def _output(self, candidates: Sequence[Candidate], flight: Flight, now: float) -> OutputDemand:
        """Of its encoder, which the request has."""
        num_tokens = len(flight.request.encoder_token_ids)
        num_held = self._found(candidates, lambda root: output_key(root, num_tokens, self._block_size), flight, now)
        return OutputDemand(-(-num_tokens // self._block_size), num_held > 0)

    def _found(
        self, candidates: Sequence[Candidate], keys_under: Callable[[bytes], Keys], flight: Flight, now: float
    ) -> NDArray[np.int64]:
        """Of each candidate, how many keys of a chain it has, or will have soon, from the first one on. `keys_under`:
        the chain, by its root."""
        feed = self.feed
        hits: NDArray[np.int64] | None = None
        for model in self._models:
            keys = keys_under(self._root(model, flight))
            predictions = feed.predicted.find(keys, now)
            num_predicted = max([prediction.last for prediction in predictions], default=0)
            keys = keys[: feed.index.num_worth_reading(keys, num_predicted)]
            if not len(keys):
                continue
            bits = feed.index.holders(keys)
            mark(bits, predictions)
            found = prefix_depths(bits).take(self._seats)
            hits = found if hits is None else hits + found  # chains of another root are with their own workers only
        return np.zeros(len(candidates), np.int64) if hits is None else hits

    def _keys(self, flight: Flight, root: bytes) -> Keys:
        """Of the request's full blocks. Those of the last one asked for are kept: a plan asks, then its placing."""
        hashes = flight.hashes(root, self._block_size)
        kept, keys = self._last_keys
        if kept is not hashes:
            keys = keys_of(hashes)
            self._last_keys = hashes, keys
        return keys

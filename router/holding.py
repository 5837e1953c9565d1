"""Whether a worker fetches the first blocks of a prompt from another one's cache, or computes them. Pure.

The fetch costs the words there and back, and the bytes at the measured rate of the pair; computing costs the tokens at
the measured speed of the worker. Only a pair that is warm has a rate. A worker that has computed nothing yet has no
speed: it fetches.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Final

from router.plan import Candidate, Holding, Plan

ASK_S: Final = 0.005  # an ask finds the holder in the middle of a step, and its answer must be read


def with_holding(plan: Plan) -> Plan:
    """The same plan, with the holder that saves most, where one saves anything."""
    choice = plan.choice
    if choice is None or choice.offer.demand.hit_blocks is None or choice.offer.demand.computes_all:
        return plan
    offer, worker = choice.offer, plan.prefill
    own = choice.num_prefill_hits
    best: Holding | None = None
    best_key = (0.0, -inf)
    for index in (offer.reusable > own).nonzero()[0].tolist():
        holder = offer.candidates[index]
        num_blocks = int(offer.reusable[index])
        saved_s = time_saved(worker, holder, num_blocks - own, offer.demand.block_size)
        key = saved_s, -holder.num_requests
        if saved_s > 0 and key > best_key:
            best, best_key = Holding(holder, num_blocks), key
    return plan if best is None else replace(plan, holding=best)


def time_saved(worker: Candidate, holder: Candidate, num_blocks: int, block_size: int) -> float:
    """Seconds by which `worker` has `num_blocks` blocks sooner from `holder` than by computing them; negative where
    it should compute, inf where its speed is not known."""
    rate = worker.warm_sources.get(holder.incarnation)
    if rate is None or holder.compatibility_hash != worker.compatibility_hash:
        return -inf
    if not worker.prefill_tokens_per_s:
        return inf
    fetch_s = ASK_S + (num_blocks * worker.block_bytes / rate if rate else 0.0)
    return num_blocks * block_size / worker.prefill_tokens_per_s - fetch_s

"""Whether a worker fetches the first blocks of a prompt from another one's cache, or computes them. Pure.

The fetch costs the words there and back, and the bytes at the measured rate of the pair; computing costs the tokens at
the measured speed of the worker. Only a pair that is warm has a rate. A worker that has computed nothing yet has no
speed: it fetches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from router.pairing import Floats, Pairing
from router.plan import Holding, Plan

_BUSY_BLOCKS: Final = 1e-7  # for each request there: of equal holders the least busy one


def spared_blocks(reusable: NDArray[np.int64], block_size: int, pairing: Pairing) -> Floats:
    """[k]: of each candidate, the blocks that it need not compute, `reusable`, and those that it is spared by fetching
    from the one that has most, less the blocks that it could compute meanwhile."""
    spared = reusable.astype(np.float64)
    most = int(reusable.argmax()) if len(reusable) else 0
    if not len(reusable) or not reusable[most]:
        return spared
    per_block = pairing.per_block(block_size)
    gain = spared[most] - spared
    gain *= per_block.gain[most]
    gain -= per_block.ask
    spared += np.maximum(gain, 0.0, out=gain)
    return spared


def with_holding(plan: Plan) -> Plan:
    """The same plan, with the holder that saves most time, where one saves any."""
    choice = plan.choice
    if choice is None:
        return plan
    demand = choice.offer.demand
    if demand.hit_blocks is None or demand.computes_all or not demand.may_fetch:
        return plan
    offer, own, worker = choice.offer, choice.num_prefill_hits, choice.computing
    more = (offer.reusable > own).nonzero()[0]
    if not len(more):
        return plan
    per_block = offer.pairing.per_block(demand.block_size)
    gain = (offer.reusable.take(more) - own) * per_block.gain[more, worker] - per_block.ask[worker]
    if not gain.max() > 0.0:
        return plan
    holder = int(more[(gain - _BUSY_BLOCKS * offer.loads.num_requests.take(more)).argmax()])
    return replace(plan, holding=Holding(offer.candidates[holder], int(offer.reusable[holder])))

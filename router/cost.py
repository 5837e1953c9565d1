"""What each way of serving a request costs, in blocks of prefill work that it waits for. Pure.

For decode worker d and source s:

    prefill(s)      `prefill_weight` for each block of the request that s has not cached
    queue(s)        prompt tokens that wait there, in blocks
    decode(d)       `decode_weight` for each request there, and the blocks that d has to wait for, its pool being full
    transfer(d, s)  the blocks that d lacks, times the seconds that one takes at the measured rate of the pair, times
                    the blocks that s computes in a second

Where d computes the prompt itself, its own prefill and queue count and nothing moves. A rate or speed that is not
measured yet makes moving free: an untried pair gets its chance.
"""

from __future__ import annotations

from math import inf

import numpy as np

from router.offer import Costs, Offer


def costs_of(offer: Offer, *, prefill_weight: float = 1.0, decode_weight: float = 1.0) -> Costs:
    """Of all ways, those that may not be chosen too."""
    candidates, demand, pairing = offer.candidates, offer.demand, offer.pairing
    decodes = [candidates[index] for index in pairing.serving]
    shape = offer.ways.shape
    block_size = demand.block_size

    num_missing = -(-demand.num_tokens // block_size) - offer.reusable[pairing.decodes]
    left = demand.num_tokens / block_size - offer.reusable * (not demand.computes_all)
    prefill, queue = np.empty(shape), np.empty(shape)
    prefill[:, :-1] = prefill_weight * left[pairing.sources]
    prefill[:, -1] = prefill_weight * left[pairing.decodes]
    queue[:, :-1] = offer.queued_tokens[pairing.sources] / block_size
    queue[:, -1] = offer.queued_tokens[pairing.decodes] / block_size

    room = np.array([inf if d.num_available_blocks is None else d.num_available_blocks for d in decodes])
    load = np.array([d.num_requests for d in decodes]) * decode_weight + np.maximum(num_missing - room, 0.0)

    transfer = np.zeros(shape)
    blocks_per_s = np.array([candidates[index].prefill_tokens_per_s for index in pairing.supplying]) / block_size
    num_bytes = num_missing * np.array([decode.block_bytes for decode in decodes])
    transfer[:, :-1] = num_bytes[:, None] * pairing.s_per_byte * blocks_per_s
    return Costs(prefill, queue, np.broadcast_to(load[:, None], shape), transfer)

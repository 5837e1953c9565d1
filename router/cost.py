"""What each way of serving a request costs, in blocks of prefill work that it waits for. Pure.

For decode worker d and source s:

    prefill(s)      `prefill_weight` for each block of the request that s has not cached; what it fetches from another
                    worker's cache counts as the blocks that it computes in that time; and what the output of an encoder
                    takes that s has not (router/outputs.py)
    queue(s)        prompt tokens that wait there, in blocks
    decode(d)       `decode_weight` for each request there, and the blocks that d has to wait for, its pool being full
    transfer(d, s)  the blocks that d lacks, times the seconds that one takes at the measured rate of the pair, times
                    the blocks that s computes in a second; and what it takes to fetch the output of an encoder that d
                    has not

Where d computes the prompt itself, its own prefill and queue count and nothing moves. A rate or speed that is not
measured yet makes moving free: an untried pair gets its chance.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from router.offer import Costs, Offer
from router.pairing import Floats


class Weights(NamedTuple):
    prefill: float = 1.0
    decode: float = 1.0


EQUAL: Final = Weights()


def costs_of(offer: Offer, weights: Weights = EQUAL) -> Costs:
    """Term by term, of all ways, those that may not be chosen too."""
    demand, pairing, loads, rates = offer.demand, offer.pairing, offer.loads, offer.rates
    decodes, sources = pairing.decodes, pairing.sources
    shape = offer.ways.shape
    block_size = demand.block_size

    num_missing = -(-demand.num_tokens // block_size) - offer.reusable[decodes]
    left = demand.num_tokens / block_size - offer.spared * (not demand.computes_all)
    if offer.output is not None:
        left += offer.output.read
    prefill, queue = np.empty(shape), np.empty(shape)
    prefill[:, :-1] = weights.prefill * left[sources]
    prefill[:, -1] = weights.prefill * left[decodes]
    queue[:, :-1] = loads.queued_tokens[sources] / block_size
    queue[:, -1] = loads.queued_tokens[decodes] / block_size

    load = loads.num_requests[decodes] * weights.decode
    load += np.maximum(num_missing - loads.num_available_blocks[decodes], 0.0)

    transfer = np.zeros(shape)
    blocks_per_s = loads.tokens_per_s[sources] / block_size
    num_bytes = num_missing * loads.block_bytes[decodes]
    transfer[:, :-1] = num_bytes[:, None] * rates.s_per_byte * blocks_per_s
    if offer.output is not None:
        transfer[:, :-1] += offer.output.fetch[decodes][:, None]
    return Costs(prefill, queue, np.broadcast_to(load[:, None], shape), transfer)


def total_of(offer: Offer, weights: Weights = EQUAL) -> Floats:
    """[m, n + 1]: `costs_of(...).total`, for a decision, in a third of the time: each step works on whole arrays that
    lie in memory as they are read, never on a part of their columns."""
    demand, pairing, loads = offer.demand, offer.pairing, offer.loads
    block_size, of_decodes = demand.block_size, pairing.of_decodes
    source = loads.queued_tokens / block_size
    source += weights.prefill * demand.num_tokens / block_size
    if not demand.computes_all:
        source -= offer.spared if weights.prefill == 1.0 else weights.prefill * offer.spared
    if offer.output is not None:
        source += weights.prefill * offer.output.read
    missing = -(-demand.num_tokens // block_size) - of_decodes(offer.reusable)
    load = missing - of_decodes(loads.num_available_blocks)
    np.maximum(load, 0.0, out=load)
    requests = of_decodes(loads.num_requests)
    load += requests if weights.decode == 1.0 else weights.decode * requests

    remote = np.zeros(offer.ways.shape[1])
    remote[:-1] = pairing.of_sources(source)
    total = missing[:, None] * pairing.per_block(block_size).transfer
    total += remote
    total += load[:, None]
    if offer.output is not None:
        total[:, :-1] += of_decodes(offer.output.fetch)[:, None]
    total[:, -1] += of_decodes(source)
    return total

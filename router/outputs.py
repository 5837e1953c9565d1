"""Which workers hold what an encoder made of an input, and what it takes the others to get it. Pure.

An output is known by its last block, which is evicted first: where that one is, all of them are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from cluster.config import Role
from cluster.hashing import encoder_hashes
from router.holder_table import Keys
from router.pairing import Floats, Mask, Pairing
from router.plan import Candidate
from router.prefix_index import keys_of

_LEAST: Final = 0.05  # of computing a block: fetching one, also where no rate or speed is measured


class OutputDemand(NamedTuple):
    """What a request needs of an encoder."""

    num_blocks: int
    held: Mask  # [k]: candidates that have it, or will soon


def output_key(root: bytes, num_tokens: int, block_size: int) -> Keys:
    """[1], in the prefix index. `root` is that of the request's hash chain, which covers the input."""
    return keys_of(encoder_hashes(root, -(-num_tokens // block_size))[-1])


class OutputWork(NamedTuple):
    """What comes before a decoder can run, in blocks of prompt that a candidate computes meanwhile: [k] each, 0 for
    those that have the output. Nobody writes into them."""

    read: Floats  # the candidate reads the input, or fetches the output where an encode worker has it
    fetch: Floats  # somebody else has the output, or is reading

    @classmethod
    def of(cls, output: OutputDemand, candidates: Sequence[Candidate], pairing: Pairing, block_size: int) -> OutputWork:
        missing: Floats = np.where(output.held, 0.0, float(output.num_blocks))
        gain = pairing.per_block(block_size).gain
        encoders = [index for index, each in enumerate(candidates) if output.held[index] and Role.ENCODE in each.roles]
        if not encoders:
            return cls(missing, np.multiply(missing, _LEAST))
        fetch = np.multiply(missing, np.clip(1 - gain[encoders].max(axis=0), _LEAST, 1.0))
        return cls(fetch, fetch)

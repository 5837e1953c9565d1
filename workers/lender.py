"""Lets other workers read what the prefix cache here holds: leased at once, and nothing is computed for it.

An ask is answered from the block table as it is now, and neither waits for anything nor takes a block away: two
workers that fetch from each other cannot wait for each other. Engine thread only.
"""

from __future__ import annotations

import os

from cluster import hashing
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.session import Session
from kvtransfer.connector import BlockSpan
from workers.assembly import Assembly


class Lender:
    """The holder's half of a fetch; `workers/borrower.py` is the other."""

    def __init__(self, parts: Assembly, metrics: Metrics, name: str) -> None:
        self._blocks = parts.blocks
        self._source = parts.source
        self._groups = [index for index, group in enumerate(parts.blocks.groups) if not group.is_fixed]
        self._block_size = parts.block_size
        self._metrics = metrics
        self._name = name
        self.draining = False

    def request(self, session: Session, ask: pb.HeldRequest, now: float) -> None:
        """A Ticket for the longest prefix of what is asked for, or KvFailed where nothing of it is here. Raises
        ValueError for hashes that are none."""
        key = RequestKey.of(ask.key)
        hashes = hashing.split(ask.block_hashes)
        found = {group: self._blocks.lookup(group, hashes, len(hashes)) for group in self._groups}
        num_blocks = min(map(len, found.values()))
        if self.draining or not num_blocks:
            code, reason = (pb.DRAINING, "is draining") if self.draining else (pb.STALE, "holds none of these blocks")
            failure = pb.Failure(code=code, message=f"{self._name} {reason}")
            session.send(pb.Frame(kv_failed=pb.KvFailed(key=ask.key, failure=failure)), key)
            return
        spans = [BlockSpan(group, ask.first_block, tuple(blocks[:num_blocks])) for group, blocks in found.items()]
        runs = self._source.publish(key, session.id, spans, now)
        self._metrics.lent_blocks.inc(num_blocks)
        ticket = pb.Ticket(
            key=ask.key,
            runs=[run.wire() for run in runs],
            num_tokens=(ask.first_block + num_blocks) * self._block_size,
            last=True,
            pid=os.getpid(),
        )
        session.send(pb.Frame(ticket=ticket), key)

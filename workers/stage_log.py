"""The stages of one traced request, as its decode worker sees them; they leave with the next tokens.

Told when a stage begins and when it ends: of a worker that dies, what its last frame said is known. All times are of
this worker's clock, from the moment it accepted the attempt. Engine thread only.
"""

from __future__ import annotations

import os

from cluster.protos import worker_pb2 as pb


class StageLog:
    """Of a request that is not traced it keeps nothing, and every method returns at once. At most one stage of a kind
    goes on at a time."""

    def __init__(self, me: pb.WorkerRef, accepted_at: float, *, on: bool) -> None:
        self.on = on
        self._me = me
        self._accepted_at = accepted_at
        self._num_stages = 0
        self._open: dict[pb.StageKind, pb.StageReport] = {}
        self._news: dict[int, pb.StageReport] = {}
        self._computes_here = False

    def take(self) -> tuple[pb.StageReport, ...]:
        """What the ingress does not know yet; to be copied into a frame at once."""
        if not self._news:
            return ()
        news = tuple(self._news.values())
        self._news.clear()
        return news

    # ------------------------------------------------------------------ an encoder elsewhere

    def encoding(self, now: float) -> None:
        if self.on and pb.ENCODING not in self._open:
            self._begin(pb.ENCODING, now)

    def encoded(self, told: pb.Encoded | None, now: float, error: str) -> None:
        report = self._open.get(pb.ENCODING)
        if report is None:
            return
        if told is not None:
            report.worker.CopyFrom(told.encode)
            report.tokens, report.blocks, report.bytes = told.tokens, told.blocks, told.bytes
        self._end(pb.ENCODING, now, error)

    # ------------------------------------------------------------------ a source

    def asked(self, source: pb.Identity, num_tokens: int, now: float) -> None:
        self._computes_here = False
        if self.on:
            report = self._begin(pb.PREFILLING, now)
            report.worker.CopyFrom(pb.WorkerRef(name=source.name, incarnation=source.incarnation))
            report.tokens = num_tokens

    def ticket(self, ticket: pb.Ticket, now: float) -> None:
        report = self._open.get(pb.PREFILLING)
        if report is None:
            return
        report.chunks += 1
        report.blocks += max((len(run.block_ids) for run in ticket.runs), default=0)
        report.pid = ticket.pid
        if ticket.last:
            report.prefix_hit_tokens = ticket.prefix_hit_tokens
            report.queue_s, report.compute_s = ticket.queue_s, ticket.compute_s
            if ticket.HasField("fetched"):
                report.fetched.CopyFrom(ticket.fetched)
            self._end(pb.PREFILLING, now)

    def reading(self, source: pb.Identity, transport: str, now: float) -> None:
        """A read is posted; the first one begins the transfer."""
        if self.on and pb.TRANSFERRING not in self._open:
            report = self._begin(pb.TRANSFERRING, now)
            report.worker.CopyFrom(pb.WorkerRef(name=source.name, incarnation=source.incarnation))
            report.transport = transport

    def read(self, num_blocks: int, num_bytes: int, read_s: float) -> None:
        """A read has ended; `read_s` comes with the last one in flight."""
        report = self._open.get(pb.TRANSFERRING)
        if report is not None:
            report.blocks += num_blocks
            report.bytes += num_bytes
            report.read_s += read_s

    def arrived(self, now: float) -> None:
        self._end(pb.TRANSFERRING, now)

    def lost(self, reason: str, now: float) -> None:
        """The source is given up."""
        self._end(pb.PREFILLING, now, reason)
        self._end(pb.TRANSFERRING, now, reason)

    # ------------------------------------------------------------------ our own engine

    def compute_here(self) -> None:
        """The prompt, or what is missing of it: from the next step on."""
        self._computes_here = self.on

    def computed(self, num_tokens: int, began_at: float) -> None:
        """A piece of known input, the first `num_tokens` of it, was in a step."""
        if not self._computes_here:
            return
        report = self._open.get(pb.PREFILLING)
        if report is None:
            report = self._begin(pb.PREFILLING, began_at)
            report.worker.CopyFrom(self._me)
            report.pid = os.getpid()
        report.chunks += 1
        report.tokens = num_tokens

    def emitted(self, began_at: float, now: float, num_hit_tokens: int) -> None:
        """A step drew a token."""
        if not self.on or pb.DECODING in self._open:
            return
        report = self._open.get(pb.PREFILLING)
        if report is not None:
            report.prefix_hit_tokens = num_hit_tokens
            self._end(pb.PREFILLING, now)
        self._computes_here = False
        self._begin(pb.DECODING, began_at if report is None else now).worker.CopyFrom(self._me)

    def preempted(self, now: float) -> None:
        if self.on:
            self.lost("preempted: its blocks were needed", now)
            self._end(pb.DECODING, now, "preempted: its blocks were needed")
            self._computes_here = True

    # ------------------------------------------------------------------ the end

    def close(self, now: float, error: str) -> None:
        for kind in list(self._open):
            self._end(kind, now, error)

    def _begin(self, kind: pb.StageKind, now: float) -> pb.StageReport:
        self._num_stages += 1
        report = pb.StageReport(number=self._num_stages, kind=kind, began_s=max(0.0, now - self._accepted_at))
        self._open[kind] = self._news[self._num_stages] = report
        return report

    def _end(self, kind: pb.StageKind, now: float, error: str = "") -> None:
        report = self._open.pop(kind, None)
        if report is not None:
            report.ended_s = max(report.began_s, now - self._accepted_at)
            report.error = error
            self._news[report.number] = report

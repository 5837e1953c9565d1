"""A decode stage in the middle of a read. Real stage, scheduler, ledger, executor and sessions; the clock moves when
told to, and loopback holds the reads, or fails them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks import checkpoint
from cluster import config_file
from cluster.config import LogConfig
from cluster.log import Log
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey, SamplingParams
from cluster.rpc import WordsThread
from kvtransfer.connector import BlockSpan, Connected, Done, Executor, ReadLimits
from kvtransfer.loopback import LoopbackFabric, LoopbackTransport
from tests.support.kv_builders import STUCK_S, T_S, Clock, KvWorker
from tests.support.words import open_pair
from workers.assembly import WorkerSettings, assemble
from workers.borrower import Borrower
from workers.decode import DecodeStage
from workers.encode_fetch import OutputFetches
from workers.pairs import Pairs
from workers.reads import Reads

BLOCK_SIZE = 4
PROMPT = tuple(range(1, 3 * BLOCK_SIZE + 1))
KEY = RequestKey("request", 1)


class PullScene:
    """A decode stage with one source and one ingress; the request is in the middle of its only read, which hangs."""

    def __init__(self, words: WordsThread, directory: Path, *, local_allowed: bool = True) -> None:
        self.clock, self.fabric = Clock(), LoopbackFabric()
        self.dones: list[Done] = []
        config = config_file.load(
            None,
            settings={
                "model.path": str(checkpoint.write(directory, checkpoint.TINY)),
                "model.load_format": "dummy",
                "kv.block_size": BLOCK_SIZE,
                "kv.num_blocks": 16,
            },
        )
        settings = WorkerSettings.of(config, "decode", "decode-0", b"a secret")
        parts = assemble(settings, self.dones.append)
        transport, limits = LoopbackTransport(self.fabric, "sink/0"), ReadLimits(T_S, STUCK_S)
        self.executor = Executor(parts.pool, transport, limits, self.dones.append, clock=self.clock)
        self.parts = replace(parts, executors=[self.executor])
        self.source = KvWorker.build("source", self.fabric, self.clock, geometry=parts.pool.geometry)
        metrics = Metrics()
        self.connected: list[Connected] = []
        self.pairs = Pairs(
            [self.executor], lambda _, each: self.connected.append(each), metrics, Log.open("t", LogConfig())
        )
        me = pb.WorkerRef(name=settings.name, incarnation=settings.incarnation)
        reads = self.reads = Reads(self.parts, self.pairs, metrics)
        borrower = Borrower(self.parts, self.pairs, reads, metrics, settings.incarnation)
        outputs = OutputFetches(self.parts, self.pairs, reads, metrics, config.scheduler, me)
        self.stage = DecodeStage(self.parts, self.pairs, reads, borrower, outputs, metrics, config.scheduler, me)

        self.to_source, self.to_ingress = open_pair(words), open_pair(words)
        self.session = self.to_source.dialed
        self.pairs.opened(self.session)
        self.pairs.offered(self.session, self.source.offer())
        self.measure()
        self._read(me, local_allowed)

    def _read(self, me: pb.WorkerRef, local_allowed: bool) -> None:
        source = pb.WorkerRef(name="source", incarnation=self.session.peer.incarnation)
        stages = [pb.StagePlan(stage=pb.PREFILL, worker=source), pb.StagePlan(stage=pb.DECODE, worker=me)]
        plan = pb.Plan(stages=stages, local_prefill_allowed=local_allowed)
        sampling = SamplingParams(max_tokens=4, ignore_eos=True).wire()
        submit = pb.Submit(key=KEY.wire(), plan=plan, prompt_token_ids=PROMPT, sampling=sampling)
        self.stage.submit(self.to_ingress.accepted, submit, self.clock.now)
        asked = self.to_source.at_worker.wait("frame", matching=lambda e: e.frame.HasField("kv_request")).frame
        theirs = self.source.filled([1, 2, 3])
        runs = self.source.source.publish(KEY, "session", [BlockSpan(0, 0, tuple(theirs))], self.clock.now)
        self.fabric.hold("source/0")
        wire, handoff = [run.wire() for run in runs], pb.Handoff(token_ids=[5])
        ticket = pb.Ticket(key=KEY.wire(), ask=asked.kv_request.ask, runs=wire, last=True, handoff=handoff)
        self.stage.ticket(self.session, ticket, self.clock.now)
        self.executor.run_once()
        assert self.parts.sink.num_in_flight == 1 and self.num_filling == 3
        assert self.parts.scheduler.num_pulling == 1

    def measure(self) -> None:
        """Until the source's rate is known."""
        while self.executor.run_once():
            pass
        self.pairs.connected(self.session, self.connected.pop(), self.clock.now)

    @property
    def num_filling(self) -> int:
        return self.parts.blocks.counts(0).filling

    def break_session(self) -> None:
        """As a worker hears of it."""
        self.session.close("the cable is cut")
        self.to_source.at_ingress.wait("broken")
        self.pairs.broken(self.session)
        self.stage.session_broken(self.session, self.clock.now)

    def tick(self, seconds: float) -> None:
        """Later; nothing came of the read, and the stage looks at its requests."""
        self.clock.now += seconds
        self.executor.run_once()
        self._hear()
        self.parts.ledger.tick(self.clock.now)
        self.stage.tick(self.clock.now)

    def _hear(self) -> None:
        dones, self.dones[:] = list(self.dones), []
        for done in dones:
            if (result := self.reads.done(done, self.clock.now)) is not None:
                self.stage.pulled(result, self.clock.now)

    def is_pulling(self) -> bool:
        return self.parts.scheduler.num_pulling == 1

    def close(self) -> None:
        for pair in (self.to_source, self.to_ingress):
            pair.dialer.stop()
            pair.server.stop()
        self.parts.sink.check_integrity()
        self.parts.ledger.check_integrity()
        self.parts.blocks.check_integrity()

"""Reads that never report, from a source whose session broke: decode gives them up, and not their blocks.

Real stage, scheduler, ledger, executor and sessions; the clock moves when told to, and loopback holds the reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

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
from tests.support.words import open_pair, words_config
from workers.assembly import WorkerSettings, assemble
from workers.borrower import Borrower
from workers.decode import DecodeStage
from workers.encode_fetch import OutputFetches
from workers.fetch import SILENT_READ_S
from workers.pairs import Pairs
from workers.reads import Reads

BLOCK_SIZE = 4
PROMPT = tuple(range(1, 3 * BLOCK_SIZE + 1))
KEY = RequestKey("request", 1)


class Scene:
    """A decode stage with one source and one ingress; the request is in the middle of its only read, which hangs."""

    def __init__(self, words: WordsThread, directory: Path) -> None:
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
        settings = WorkerSettings(
            name="decode-0",
            incarnation=uuid4().hex,
            pool="decode",
            resources=config.pools["decode"],
            model=config.model,
            engine=config.engine,
            kv=config.kv,
            scheduler=config.scheduler,
            transfer=config.transfer,
            words=config.words,
            secret=b"a secret",
        )
        parts = assemble(settings, self.dones.append)
        transport, limits = LoopbackTransport(self.fabric, "sink/0"), ReadLimits(T_S, STUCK_S)
        self.executor = Executor(parts.pool, transport, limits, self.dones.append, clock=self.clock)
        self.parts = replace(parts, executors=[self.executor])
        self.source = KvWorker.build("source", self.fabric, self.clock, geometry=parts.pool.geometry)
        metrics = Metrics()
        connected: list[Connected] = []
        self.pairs = Pairs([self.executor], lambda _, each: connected.append(each), metrics, Log.open("t", LogConfig()))
        me = pb.WorkerRef(name=settings.name, incarnation=settings.incarnation)
        reads = self.reads = Reads(self.parts, self.pairs, metrics)
        borrower = Borrower(self.parts, self.pairs, reads, metrics, settings.incarnation)
        outputs = OutputFetches(self.parts, self.pairs, reads, metrics, config.scheduler, me)
        self.stage = DecodeStage(self.parts, self.pairs, reads, borrower, outputs, metrics, config.scheduler, me)

        self.to_source, self.to_ingress = open_pair(words), open_pair(words)
        self.session = self.to_source.dialed
        self.pairs.opened(self.session)
        self.pairs.offered(self.session, self.source.offer())
        while self.executor.run_once():
            pass
        self.pairs.connected(self.session, connected[-1], self.clock.now)
        self._read(me)

    def _read(self, me: pb.WorkerRef) -> None:
        source = pb.WorkerRef(name="source", incarnation=self.session.peer.incarnation)
        stages = [pb.StagePlan(stage=pb.PREFILL, worker=source), pb.StagePlan(stage=pb.DECODE, worker=me)]
        plan = pb.Plan(stages=stages, local_prefill_allowed=True)
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


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with WordsThread(config=words_config(heartbeat_timeout_s=60)) as words:
        scene = Scene(words, tmp_path)
        yield scene
        scene.close()


def test_they_are_given_up_after_the_allowed_silence_and_the_prompt_is_computed_here(scene: Scene) -> None:
    scene.break_session()
    assert scene.is_pulling(), "a broken session alone ends no read: it may be about to complete"
    scene.tick(SILENT_READ_S)
    assert scene.is_pulling()
    scene.tick(0.01)
    assert not scene.is_pulling()
    assert scene.num_filling == 3, "what a read may still write to is nobody's"
    scene.tick(0.1)  # past the pause before the next try
    assert scene.parts.scheduler.num_waiting == 1 and scene.parts.engine.has_work
    outcome = scene.parts.engine.step()
    assert outcome is not None and outcome.error is None
    [emitted] = outcome.tokens
    assert emitted.first_token_index == 1, "the first token was told by the source"
    assert scene.num_filling == 3 + 1, "the read's, and the last of its own, which is not full"

    scene.fabric.resume("source/0")
    scene.tick(0.01)
    assert scene.num_filling == 1 and scene.parts.sink.num_in_flight == 0
    scene.stage.cancel(scene.to_ingress.accepted, KEY, scene.clock.now)
    assert scene.stage.num_open == 0
    counts = scene.parts.blocks.counts(0)
    assert counts.free + counts.cached == 16


def test_those_that_are_given_up_are_quarantined_until_they_come_after_all(scene: Scene) -> None:
    scene.break_session()
    scene.tick(SILENT_READ_S + 0.01)
    scene.stage.cancel(scene.to_ingress.accepted, KEY, scene.clock.now)
    assert scene.num_filling == 3
    scene.tick(STUCK_S)
    counts = scene.parts.blocks.counts(0)
    assert (counts.filling, counts.quarantined) == (0, 3)
    scene.tick(100 * T_S)
    assert scene.parts.blocks.counts(0).quarantined == 3, "they may be written still"
    scene.fabric.resume("source/0")
    scene.tick(0.01)
    assert scene.parts.blocks.counts(0).free == 16
    assert scene.stage.num_open == 0


def test_a_read_from_a_source_whose_session_is_open_is_waited_for(scene: Scene) -> None:
    scene.tick(10 * SILENT_READ_S)
    assert scene.is_pulling() and scene.parts.sink.num_in_flight == 1
    scene.fabric.resume("source/0")
    scene.tick(0.0)
    assert not scene.is_pulling() and scene.parts.scheduler.num_running + scene.parts.scheduler.num_waiting == 1
    scene.stage.cancel(scene.to_ingress.accepted, KEY, scene.clock.now)
    assert scene.stage.num_open == 0


def test_a_read_that_completes_within_the_silence_counts(scene: Scene) -> None:
    scene.break_session()
    scene.fabric.resume("source/0")
    scene.tick(SILENT_READ_S)
    assert not scene.is_pulling() and scene.num_filling == 0, "all blocks came: nothing is computed again"
    assert scene.parts.scheduler.num_running + scene.parts.scheduler.num_waiting == 1

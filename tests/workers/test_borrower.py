"""A fetch in the middle of its reads, with everything that may happen to it then: the engine goes on from what came.

Two real workers' parts in one process, with real sessions between them; the clock moves when told to, and loopback
holds the reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import checkpoint
from cluster import config_file
from cluster.config import LogConfig, SluiceConfig
from cluster.hashing import chain_root
from cluster.log import Log
from cluster.metrics import FetchOutcome, Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import Pooling, RequestKey, SamplingParams
from cluster.rpc import WordsThread
from kvtransfer.connector import Connected, Done, Executor, ReadLimits
from kvtransfer.loopback import LoopbackFabric, LoopbackTransport
from tests.support.kv_builders import STUCK_S, T_S, Clock
from tests.support.words import Recorder, open_pair, words_config
from workers.assembly import Assembly, WorkerSettings, assemble
from workers.borrower import ANSWER_S, Borrower
from workers.engine.sequence import Sequence
from workers.fetch import SILENT_READ_S
from workers.lender import Lender
from workers.pairs import Pairs
from workers.reads import Reads

BLOCK_SIZE = 4
NUM_BLOCKS = 16
PROMPT = [*range(1, 5 * BLOCK_SIZE + 2)]  # five blocks and a token
HOLDER = "holder/0"


class Side:
    """One worker's parts over loopback."""

    def __init__(self, name: str, config: SluiceConfig, fabric: LoopbackFabric, clock: Clock) -> None:
        settings = WorkerSettings.of(config, "prefill", name, b"a secret", incarnation=name)
        self.dones: list[Done] = []
        parts = assemble(settings, self.dones.append)
        transport, limits = LoopbackTransport(fabric, f"{name}/0"), ReadLimits(T_S, STUCK_S)
        self.executor = Executor(parts.pool, transport, limits, self.dones.append, clock=clock)
        self.parts: Assembly = replace(parts, executors=[self.executor])

    def sequence(self, pooling: Pooling | None = None) -> Sequence:
        sampling = SamplingParams(max_tokens=4, ignore_eos=True, pooling=pooling)
        key = RequestKey("request", 1)
        seq = Sequence(1, key, list(PROMPT), len(PROMPT), sampling, arrival=1, stop_after_first=True)
        seq.extend_hashes(chain_root(self.parts.compatibility_hash), len(PROMPT) // BLOCK_SIZE, BLOCK_SIZE)
        return seq

    def first_token(self) -> tuple[int, int]:
        """Of the only sequence, and how many tokens were computed for it."""
        num_computed = 0
        while True:
            outcome = self.parts.engine.step()
            assert outcome is not None and outcome.error is None
            num_computed += self.parts.engine.last_batch.num_tokens
            if outcome.tokens:
                return outcome.tokens[0].token, num_computed

    def num_idle(self) -> int:
        counts = self.parts.blocks.counts(0)
        return counts.free + counts.cached


class Scene:
    """The holder has the prompt's five blocks; the sink has asked for them and reads, and the read hangs."""

    def __init__(self, words: WordsThread, directory: Path) -> None:
        self.clock, self.fabric, self.metrics = Clock(), LoopbackFabric(), Metrics()
        config = config_file.load(
            None,
            settings={
                "model.path": str(checkpoint.write(directory, checkpoint.TINY)),
                "model.load_format": "dummy",
                "kv.block_size": BLOCK_SIZE,
                "kv.num_blocks": NUM_BLOCKS,
            },
        )
        self.holder = Side("holder", config, self.fabric, self.clock)
        self.sink = Side("sink", config, self.fabric, self.clock)
        self.holder.parts.scheduler.add(self.holder.sequence())
        self.expected, num_computed = self.holder.first_token()
        assert num_computed == len(PROMPT)
        self.holder.parts.scheduler.schedule()  # lets go of what has ended

        self.link = open_pair(words)
        self.session = self.link.dialed
        connected: list[Connected] = []
        parts = self.sink.parts
        pairs = Pairs(parts.executors, lambda _, each: connected.append(each), self.metrics, Log.open("t", LogConfig()))
        pairs.opened(self.session)
        offer = pb.TransportOffer(transport="loopback", ranks=[self.holder.executor.offer()], late_read_ms=10**6)
        pairs.offered(self.session, offer)
        while self.sink.executor.run_once():
            pass
        pairs.connected(self.session, connected[-1], self.clock.now)
        self.reads = Reads(parts, pairs, self.metrics)
        self.lender = Lender(self.holder.parts, Metrics(), "holder")
        self.borrower = Borrower(parts, pairs, self.reads, self.metrics, "sink")

    def ask(self) -> Sequence:
        sequence = self.sink.sequence()
        assert self.begins(sequence)
        return sequence

    def begins(self, sequence: Sequence) -> bool:
        holder = pb.WorkerRef(name="holder", incarnation=self.session.peer.incarnation)
        return self.borrower.begin(sequence, pb.Holding(holder=holder, num_blocks=5), self.clock.now)

    def answer(self) -> pb.Frame:
        """What the holder says; the sink has not heard it yet."""
        asked = self.heard(self.link.at_worker, "held_request").held_request
        self.lender.request(self.link.accepted, asked, self.clock.now)
        return self.heard(self.link.at_ingress, "ticket")

    def hear(self, answer: pb.Frame) -> bool:
        return self.borrower.ticket(self.session, answer.ticket, self.clock.now)

    def begin_read(self) -> Sequence:
        """Of all five blocks; it hangs."""
        self.fabric.hold(HOLDER)
        sequence = self.ask()
        assert self.hear(self.answer())
        self.sink.executor.run_once()
        assert self.sink.parts.sink.num_in_flight == 1
        return sequence

    def released(self) -> None:
        """The holder hears that its blocks are no longer wanted: it leases nothing any more."""
        release = self.heard(self.link.at_worker, "release").release
        assert self.holder.parts.source.release(RequestKey.of(release.key))
        assert self.holder.num_idle() == NUM_BLOCKS

    def tick(self, seconds: float) -> None:
        self.clock.now += seconds
        self.sink.executor.run_once()
        dones, self.sink.dones[:] = list(self.sink.dones), []
        for done in dones:
            if (result := self.reads.done(done, self.clock.now)) is not None:
                assert self.borrower.pulled(result, self.clock.now) or self.borrower.num_open == 0
        self.sink.parts.ledger.tick(self.clock.now)
        self.borrower.tick(self.clock.now)

    def outcomes(self) -> dict[FetchOutcome, float]:
        counts = {
            outcome: self.metrics.value("sluice_transfer_fetches_total", {"outcome": outcome})
            for outcome in FetchOutcome
        }
        return {outcome: count for outcome, count in counts.items() if count}

    def computes(self, num_tokens: int) -> None:
        """The engine goes on and needs so many; what it says is right."""
        assert self.sink.first_token() == (self.expected, num_tokens)
        self.sink.parts.scheduler.schedule()

    def close(self) -> None:
        self.link.dialer.stop()
        self.link.server.stop()
        for side in (self.sink, self.holder):
            side.parts.sink.check_integrity()
            side.parts.ledger.check_integrity()
            side.parts.blocks.check_integrity()

    def heard(self, recorder: Recorder, kind: str) -> pb.Frame:
        """The only frame of its kind."""
        return recorder.wait("frame", matching=lambda event: event.frame.WhichOneof("kind") == kind).frame


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with WordsThread(config=words_config(heartbeat_timeout_s=60)) as words:
        scene = Scene(words, tmp_path)
        yield scene
        scene.close()


def test_what_comes_is_not_computed(scene: Scene) -> None:
    sequence = scene.begin_read()
    assert not scene.sink.parts.engine.has_work, "the engine waits for nothing"
    scene.fabric.resume(HOLDER)
    scene.tick(0.0)
    scene.released()
    scene.computes(1)
    fetched = scene.borrower.leave(sequence)
    assert fetched is not None and (fetched.holder.name, fetched.blocks) == ("holder", 5) and fetched.bytes > 0
    assert scene.outcomes() == {FetchOutcome.OK: 1}
    assert scene.metrics.value("sluice_transfer_fetched_tokens_total") == 5 * BLOCK_SIZE


def test_a_holder_that_dies_in_the_middle_of_a_read_costs_what_it_did_not_bring(scene: Scene) -> None:
    scene.begin_read()
    scene.fabric.kill(HOLDER)
    scene.tick(0.0)
    scene.computes(len(PROMPT))
    assert scene.outcomes() == {FetchOutcome.LOST: 1}
    assert scene.sink.num_idle() == NUM_BLOCKS and scene.borrower.num_open == 0


def test_a_read_that_hangs_behind_a_broken_session_is_left_to_itself(scene: Scene) -> None:
    scene.begin_read()
    scene.session.close("the cable is cut")
    scene.link.at_ingress.wait("broken")
    scene.borrower.session_broken(scene.session, scene.clock.now)
    scene.tick(SILENT_READ_S)
    assert not scene.sink.parts.engine.has_work, "it may be about to complete"
    scene.tick(0.01)
    scene.computes(len(PROMPT))
    assert scene.sink.parts.blocks.counts(0).filling == 5, "what a read may still write to is nobody's"
    scene.fabric.resume(HOLDER)
    scene.tick(0.01)
    assert scene.sink.num_idle() == NUM_BLOCKS
    assert scene.outcomes() == {FetchOutcome.LOST: 1}


def test_a_request_that_ends_first_keeps_the_blocks_leased_until_the_read_is_over(scene: Scene) -> None:
    sequence = scene.begin_read()
    assert scene.borrower.leave(sequence) is None
    scene.sink.parts.scheduler.abort(sequence)
    assert scene.borrower.num_open == 1 and scene.holder.parts.ledger.num_leased_blocks == 5
    scene.fabric.resume(HOLDER)
    scene.tick(0.0)
    scene.released()
    assert scene.borrower.num_open == 0 and scene.sink.num_idle() == NUM_BLOCKS
    assert scene.outcomes() == {FetchOutcome.CANCELLED: 1}


def test_a_holder_that_is_busy_is_not_waited_for(scene: Scene) -> None:
    """Its answer comes late, and finds nobody."""
    scene.ask()
    scene.tick(ANSWER_S)
    assert not scene.sink.parts.engine.has_work
    scene.tick(0.01)
    late = scene.answer()
    scene.computes(len(PROMPT))
    assert not scene.hear(late)
    scene.released()
    assert scene.outcomes() == {FetchOutcome.REFUSED: 1}


@pytest.mark.parametrize("pooling", Pooling)
def test_nothing_is_fetched_for_a_vector(scene: Scene, pooling: Pooling) -> None:
    """It is read where the prompt is computed, and holds no reservation."""
    assert not scene.begins(scene.sink.sequence(pooling))
    assert scene.outcomes() == {FetchOutcome.UNNEEDED: 1}


def test_a_draining_worker_lends_nothing(scene: Scene) -> None:
    scene.lender.draining = True
    scene.ask()
    asked = scene.heard(scene.link.at_worker, "held_request").held_request
    scene.lender.request(scene.link.accepted, asked, scene.clock.now)
    failed = scene.heard(scene.link.at_ingress, "kv_failed").kv_failed
    assert failed.failure.code == pb.DRAINING
    assert scene.borrower.kv_failed(scene.session, failed, scene.clock.now)
    scene.computes(len(PROMPT))
    assert scene.outcomes() == {FetchOutcome.REFUSED: 1}

"""Sources and what moves their blocks: what is told of a pair is what was measured, under its name."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO

import pytest

from cluster.config import LogConfig
from cluster.log import Log
from cluster.metrics import Metrics
from cluster.rpc import WordsThread
from kvtransfer.connector import Connected
from kvtransfer.loopback import LoopbackFabric
from tests.support.kv_builders import Clock, KvWorker
from tests.support.words import open_pair, words_config
from workers.pairs import FIRST_PAUSE_S, Pairs

NAME = "sluice_transfer_warm_rate_bytes_per_second"
WAYS = ("near", "far")


class Scene:
    """A sink with two ways to its source, and a millisecond with each poll."""

    def __init__(self, words: WordsThread, tp_size: int = 1) -> None:
        self.fabric, self.clock, self.metrics, self.said = LoopbackFabric(), Clock(), Metrics(), StringIO()
        self.source, self.sink = (
            KvWorker.build(name, self.fabric, self.clock, ways=WAYS, tp_size=tp_size) for name in ("source", "sink")
        )
        self.link = open_pair(words)
        self.session = self.link.dialed
        self.connected: list[Connected] = []
        log = Log.open("test", LogConfig(level="info"), self.said)
        executors = [rank.executor for rank in self.sink.ranks]
        self.pairs = Pairs(executors, lambda _, each: self.connected.append(each), self.metrics, log)

    def meet(self) -> None:
        self.pairs.opened(self.session)
        self.pairs.offered(self.session, self.source.offer())
        assert self.measure()

    def measure(self) -> int:
        """Until each rank that was asked has an answer; how many have."""
        while self.sink.run_once():
            self.clock.now += 0.001
        results, self.connected[:] = sorted(self.connected, key=lambda each: each.rank), []
        for result in results:
            self.pairs.connected(self.session, result, self.clock.now)
        return len(results)

    def close(self) -> None:
        self.link.dialer.stop()
        self.link.server.stop()

    def rates(self) -> dict[str, float]:
        """By way, of those that the gauge shows for the source."""
        name = self.session.peer.name
        values = {way: self.metrics.registry.get_sample_value(NAME, {"transport": way, "peer": name}) for way in WAYS}
        return {way: value for way, value in values.items() if value is not None}


@pytest.fixture
def scene() -> Iterator[Scene]:
    with WordsThread(config=words_config(heartbeat_timeout_s=60)) as words:
        scene = Scene(words)
        yield scene
        scene.close()


def test_a_pair_is_told_under_what_moves_its_blocks(scene: Scene) -> None:
    scene.fabric.slow("source/0", 3, "near")
    scene.meet()
    (report,) = scene.pairs.reports()
    assert (report.transport, report.warm) == ("far", True)
    assert scene.pairs.transport(scene.session) == "far"
    assert scene.rates() == {"far": report.bytes_per_s} and report.bytes_per_s > 0
    assert "transport=far" in scene.said.getvalue() and "near at " in scene.said.getvalue()

    scene.pairs.broken(scene.session)
    assert scene.pairs.transport(scene.session) == ""
    scene.sink.run_once()
    scene.fabric.slow("source/0", 0, "near")
    scene.fabric.slow("source/0", 3, "far")
    scene.meet()
    (report,) = scene.pairs.reports()
    assert scene.rates() == {"near": report.bytes_per_s}, "one pair, one rate"


def test_a_pair_of_which_one_rank_cannot_be_read_is_said_once_and_tried_ever_more_rarely() -> None:
    with WordsThread(config=words_config(heartbeat_timeout_s=60)) as words:
        scene = Scene(words, tp_size=2)
        scene.fabric.kill("source/1")
        scene.meet()
        for pause_s in (FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S):
            assert scene.pairs.warm(scene.session.peer.incarnation) is None
            failed_at = scene.clock.now
            scene.pairs.tick(failed_at + 0.9 * pause_s)
            assert not scene.measure()
            scene.clock.now = failed_at + pause_s + 0.01
            scene.pairs.tick(scene.clock.now)
            assert scene.measure() == 2
        assert scene.said.getvalue().count("source cannot be read") == 1
        scene.close()

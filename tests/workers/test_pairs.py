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
from workers.pairs import Pairs

NAME = "sluice_transfer_warm_rate_bytes_per_second"
WAYS = ("near", "far")


class Scene:
    """A sink with two ways to its source, and a millisecond with each poll."""

    def __init__(self, words: WordsThread) -> None:
        self.fabric, self.clock, self.metrics, self.said = LoopbackFabric(), Clock(), Metrics(), StringIO()
        self.source, self.sink = (
            KvWorker.build(name, self.fabric, self.clock, ways=WAYS) for name in ("source", "sink")
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
        while self.sink.run_once():
            self.clock.now += 0.001
        self.pairs.connected(self.session, self.connected.pop(), self.clock.now)

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
        scene.link.dialer.stop()
        scene.link.server.stop()


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

"""Connecting to a source: what is checked, measured, kept and given up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cluster.errors import TransferError
from cluster.protos import worker_pb2 as pb
from kvtransfer.connector import BlockPair, Connected, Outcome, Pull
from kvtransfer.layout import KvGeometry
from kvtransfer.loopback import LoopbackFabric
from tests.support.kv_builders import KEY, STUCK_S, Clock, KvPair, KvWorker, heads_geometry, latent_geometry


def test_geometry_mismatch_is_found_at_connect_with_both_geometries() -> None:
    fabric, clock = LoopbackFabric(), Clock()
    source = KvWorker.build("source", fabric, clock, geometry=latent_geometry(row_size=8))
    sink = KvWorker.build("sink", fabric, clock, geometry=latent_geometry(row_size=4))
    (connected,) = sink.connect(source)
    message = str(connected.error)
    assert f"0/latents: {2 * 4 * 8 * 2} B a block" in message
    assert f"0/latents: {2 * 4 * 4 * 2} B a block" in message
    assert '"row_size":4' in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda offer: setattr(offer, "transport", "nixl"), "'nixl'"),
        (lambda offer: offer.failure.CopyFrom(pb.Failure(message="no common transport")), "no common transport"),
        (lambda offer: offer.ranks.pop(), "no rank of shard 0"),
        (lambda offer: offer.ranks[0].generations.pop(), "KV geometry"),
        (lambda offer: setattr(offer.ranks[0].regions[0], "num_blocks", 3), "must be equal"),
        (lambda offer: setattr(offer.ranks[0].regions[0], "address", 64), "not registered"),
        (lambda offer: setattr(offer.ranks[0], "tp_size", 2), "holds K/V head"),
    ],
)
def test_an_offer_that_does_not_fit_is_an_error_of_the_connect(change, message: str) -> None:
    pair = KvPair(geometry=heads_geometry())
    offer = pair.source.offer()
    change(offer)
    if offer.ranks and offer.ranks[0].tp_size == 2:
        for region, spec in zip(offer.ranks[0].regions[:2], heads_geometry().groups[0].regions, strict=True):
            region.block_bytes = spec.block_bytes(2)
        offer.ranks[0].regions[2].block_bytes = heads_geometry().groups[1].regions[0].block_bytes(2)
    pair.sink.connected.clear()
    pair.sink.ranks[0].executor.connect("other", offer, pair.sink.connected.append)
    pair.sink.run_once()
    (connected,) = pair.sink.connected
    assert isinstance(connected.error, TransferError)
    assert message in str(connected.error)


def test_connecting_measures_and_leaves_no_trace_in_the_pool() -> None:
    pair = KvPair()
    (connected,) = pair.sink.connect(pair.source)
    assert (connected.peer, connected.transport, connected.rank) == ("source", "loopback", 0)
    assert connected.bytes_per_s > 0
    assert pair.reads() == []
    assert not pair.sink.ranks[0].pool.regions[0][0][1:].any()


def test_a_warm_up_that_never_completes_is_an_error() -> None:
    fabric, clock = LoopbackFabric(), Clock()
    source, sink = (KvWorker.build(name, fabric, clock) for name in ("source", "sink"))
    fabric.hold("source/0")
    sink.ranks[0].executor.connect("source", source.offer(), sink.connected.append)
    assert sink.run_once()
    clock.now += STUCK_S + 1
    assert not sink.run_once()
    assert "has not completed" in str(sink.connected[0].error)


def test_of_several_ways_the_fastest_is_kept() -> None:
    fabric, clock = LoopbackFabric(), Clock()
    source, sink = (KvWorker.build(name, fabric, clock, ways=("near", "far", "farther")) for name in ("source", "sink"))
    for way, polls in (("near", 2), ("farther", 9)):
        fabric.slow("source/0", polls, way)
    (connected,) = connected_in_time(source, sink)
    assert (connected.error, connected.transport) == (None, "far")
    num_bytes = 64 * sink.ranks[0].pool.geometry.groups[0].block_bytes()
    assert connected.rates == {
        "near": pytest.approx(num_bytes / 0.003),
        "far": pytest.approx(num_bytes / 0.001),
        "farther": pytest.approx(num_bytes / 0.010),
    }
    assert connected.bytes_per_s == connected.rates["far"]
    theirs, ours = source.filled([7]), sink.reserve(1)
    sink.pull(KEY, "source", source.publish(KEY, "session", theirs), ours)
    while sink.run_once():
        pass
    (result,) = sink.settle()
    assert (result.outcome, result.transport) == (Outcome.OK, "far") and sink.holds(0, ours[0], 7)

    fabric.slow("source/0", 0, "farther")
    fabric.slow("source/0", 3, "far")
    (connected,) = connected_in_time(source, sink)
    assert connected.transport == "farther", "measured again"


def test_a_way_that_fails_is_out() -> None:
    fabric, clock = LoopbackFabric(), Clock()
    source, sink = (KvWorker.build(name, fabric, clock, ways=("near", "far")) for name in ("source", "sink"))
    fabric.slow("source/0", 5, "far")
    fabric.fail("source/0")
    (connected,) = connected_in_time(source, sink)
    assert (connected.error, connected.transport, list(connected.rates)) == (None, "far", ["far"])
    fabric.kill("source/0")
    (connected,) = connected_in_time(source, sink)
    assert "source/0 is gone" in str(connected.error) and not connected.rates


def connected_in_time(source: KvWorker, sink: KvWorker) -> list[Connected]:
    """A millisecond passes with each poll."""
    sink.connected.clear()
    for rank in sink.ranks:
        rank.executor.connect(source.name, source.offer(), sink.connected.append)
    while sink.run_once():
        sink.clock.now += 0.001
    return sink.connected


def test_pulls_after_a_disconnect_are_lost_and_those_before_complete() -> None:
    pair = KvPair()
    pair.hold()
    _, ours, _ = pair.start([7])
    pair.sink.run_once()
    executor = pair.sink.ranks[0].executor
    executor.disconnect("source")
    executor.submit(Pull(1000, "source", (BlockPair(0, 1, ours[0]),), (1,)))
    pair.sink.run_once()
    assert [(done.id, done.outcome) for done in pair.sink.dones] == [(1000, Outcome.LOST)]
    assert "not connected" in pair.sink.dones.pop().error
    pair.fabric.resume("source/0")
    assert [result.outcome for result in pair.sink.pump()] == [Outcome.OK]
    assert pair.sink.holds(0, ours[0], 7)
    (connected,) = pair.sink.connect(pair.source)
    assert connected.error is None, "the same incarnation may come back"


def test_a_reconnect_while_reads_are_in_flight_keeps_them() -> None:
    pair = KvPair()
    pair.hold()
    pair.start([7])
    pair.sink.run_once()
    executor = pair.sink.ranks[0].executor
    executor.disconnect("source")
    executor.connect("source", pair.source.offer(), pair.sink.connected.append)
    pair.sink.run_once()
    pair.fabric.resume("source/0")
    while pair.sink.run_once():
        pass
    assert [result.outcome for result in pair.sink.settle()] == [Outcome.OK]
    assert pair.sink.connected[-1].error is None


def test_what_does_not_travel_is_neither_offered_nor_read() -> None:
    """Nor registered: whatever a sink asks for, it cannot have it."""
    (group,) = latent_geometry().groups
    latents, indexer = group.regions
    geometry = KvGeometry((replace(group, regions=(replace(latents, travels=False), indexer)),), "interleaved")
    pair = KvPair(geometry=geometry)
    ((offered,),) = [rank.regions for rank in pair.source.offer().ranks]
    assert offered.name == "indexer"
    theirs, ours, _ = pair.start([7, 8])
    (result,) = pair.sink.pump()
    assert result.outcome is Outcome.OK and result.num_bytes == 2 * indexer.block_bytes()
    at_source, at_sink = (worker.ranks[0].pool.regions[0] for worker in (pair.source, pair.sink))
    assert at_source[0][theirs].any() and not at_sink[0][ours].any()
    assert torch.equal(at_source[1][theirs], at_sink[1][ours])

    offer = pair.source.offer()
    stolen = offer.ranks[0].regions.add()
    stolen.CopyFrom(offered)
    stolen.name, stolen.address, stolen.block_bytes = "latents", at_source[0].data_ptr(), latents.block_bytes()
    pair.sink.connected.clear()
    pair.sink.ranks[0].executor.connect("other", offer, pair.sink.connected.append)
    pair.sink.run_once()
    assert "KV geometry of other" in str(pair.sink.connected[0].error), "an offer of what does not travel"
    greedy = KvWorker.build("greedy", pair.fabric, pair.clock, geometry=latent_geometry())
    greedy.ranks[0].executor.connect("source", offer, greedy.connected.append)
    greedy.run_once()
    assert "not registered" in str(greedy.connected[0].error)
    pair.check()

"""Offers with handles beside them, and peers that know nothing of handles. What is read through them, and that a handle
which is refused costs nothing but speed: tests/gpu/test_ipc.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cluster.protos import worker_pb2 as pb
from kvtransfer.connector import Outcome
from kvtransfer.ipc_transport import IpcTransport, host_id
from kvtransfer.loopback import LoopbackFabric, LoopbackTransport
from kvtransfer.transport import Transport
from tests.support.kv_builders import KEY, Clock, KvWorker


def with_ipc(below: LoopbackTransport) -> Transport:
    """Of host memory, which has no handles."""
    return IpcTransport(below, torch.device("cpu"), measured=True)


def built(over: tuple[Callable[[LoopbackTransport], Transport] | None, ...]) -> list[KvWorker]:
    fabric, clock = LoopbackFabric(), Clock()
    return [KvWorker.build(name, fabric, clock, over=each) for name, each in zip(("source", "sink"), over, strict=True)]


def pulls(source: KvWorker, sink: KvWorker, offer: pb.TransportOffer) -> None:
    """Over what both have."""
    sink.ranks[0].executor.connect("source", offer, sink.connected.append)
    while sink.run_once():
        pass
    (connected,) = sink.connected
    assert (connected.error, connected.transport) == (None, "loopback")
    theirs, ours = source.filled([7, 8]), sink.reserve(2)
    sink.pull(KEY, "source", source.publish(KEY, "session", theirs), ours)
    while sink.run_once():
        pass
    (result,) = sink.settle()
    assert (result.outcome, result.transport) == (Outcome.OK, "loopback")
    assert [sink.holds(0, block, content) for block, content in zip(ours, (7, 8), strict=True)] == [True, True]
    sink.ranks[0].executor.stop()
    assert sink.ranks[0].transport.reads == {}


@pytest.mark.parametrize("over", [(with_ipc, None), (None, with_ipc), (with_ipc, with_ipc)])
def test_workers_of_both_kinds_pair_and_read_each_other(
    over: tuple[Callable[[LoopbackTransport], Transport] | None, ...],
) -> None:
    source, sink = built(over)
    (offered,) = source.offer().ranks
    assert offered.HasField("ipc") == (over[0] is not None)
    assert offered.metadata == b"source/0", "as without handles"
    names = {worker.ranks[0].executor.transport_name for worker in (source, sink)}
    assert names == {"loopback"}, "what must be equal for the two to be paired"
    pulls(source, sink, source.offer())


@pytest.mark.parametrize("over", [None, with_ipc])
def test_handles_of_another_host_are_left_alone(over: Callable[[LoopbackTransport], Transport] | None) -> None:
    source, sink = built((None, over))
    offer = source.offer()
    offer.ranks[0].ipc.host = b"not " + host_id()
    for region in offer.ranks[0].regions:
        offer.ranks[0].ipc.spans.add(address=region.address, num_bytes=1 << 20, handle=bytes(64))
    pulls(source, sink, offer)

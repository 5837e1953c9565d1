"""The executor on its own thread, and the pool it works on."""

from __future__ import annotations

import threading
from queue import SimpleQueue

import pytest
import torch

from cluster.protos import worker_pb2 as pb
from kvtransfer.connector import BlockPair, Connected, Done, Executor, Outcome, Pull, ReadLimits
from kvtransfer.layout import RankLayout
from kvtransfer.loopback import LoopbackFabric, LoopbackTransport
from kvtransfer.pool import GenerationTable, KvPool
from tests.support.kv_builders import heads_geometry, latent_geometry

DEADLINE_S = 20.0
GEOMETRY = latent_geometry()


def test_two_executors_on_threads_of_their_own() -> None:
    fabric = LoopbackFabric()
    dones: SimpleQueue[Done] = SimpleQueue()
    connected: SimpleQueue[Connected] = SimpleQueue()
    pools = [KvPool.allocate(GEOMETRY, RankLayout(0), [8]) for _ in range(2)]
    source, sink = (
        Executor(pool, LoopbackTransport(fabric, name), ReadLimits(30.0, 60.0), dones.put)
        for name, pool in zip(("source", "sink"), pools, strict=True)
    )
    source.start()
    sink.start()
    pools[0].generations[0].raise_to([1, 2], [1, 1])
    for storage in pools[0].regions[0]:
        storage[1:3].random_(0, 256)
    offer = pb.TransportOffer(transport="loopback", ranks=[source.offer()])
    sink.connect("source", offer, connected.put)
    assert connected.get(timeout=DEADLINE_S).error is None
    for number in range(50):
        fabric.slow("source", number % 3)
        sink.submit(Pull(number, "source", (BlockPair(0, 1, 8), BlockPair(0, 2, 4)), (1, 1)))
    outcomes = {(done := dones.get(timeout=DEADLINE_S)).id: done.outcome for _ in range(50)}
    assert outcomes == dict.fromkeys(range(50), Outcome.OK)
    for theirs, ours in zip(pools[0].regions[0], pools[1].regions[0], strict=True):
        assert torch.equal(theirs[1:3], ours[[8, 4]])
    fabric.kill("source")
    sink.submit(Pull(99, "source", (BlockPair(0, 1, 8),), (1,)))
    assert dones.get(timeout=DEADLINE_S).outcome is Outcome.LOST
    for executor in (sink, source):
        executor.stop()
        executor.stop()
    assert dones.empty()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bytes_thread_that_ends_says_so() -> None:
    called = threading.Event()

    def broken(_: Done) -> None:
        called.set()
        raise RuntimeError("our bug")

    pool = KvPool.allocate(GEOMETRY, RankLayout(0), [8])
    executor = Executor(pool, LoopbackTransport(LoopbackFabric(), "sink"), ReadLimits(30.0, 60.0), broken)
    executor.start()
    assert executor.failure is None
    executor.submit(Pull(1, "nobody", (BlockPair(0, 1, 1),), (1,)))
    assert called.wait(DEADLINE_S)
    executor.stop()
    assert str(executor.failure) == "our bug"


def test_pool_shapes_follow_geometry_and_layout() -> None:
    geometry = heads_geometry(kv_heads=4)
    pool = KvPool.allocate(geometry, RankLayout(1, 1, 2), [5, 3])
    assert pool.num_blocks == [6, 4]
    for group, spec in enumerate(geometry.groups):
        for region, storage in zip(spec.regions, pool.regions[group], strict=True):
            assert storage.shape == (pool.num_blocks[group], region.num_layers, region.page_bytes(2))
            assert storage.is_contiguous() and storage.dtype is torch.uint8 and not storage.any()


def test_generations_only_rise_whoever_raises_them() -> None:
    table = GenerationTable(64)

    def raise_all(first: int) -> None:
        for generation in range(first, 400, 2):
            table.raise_to(range(64), [generation] * 64)
            table.raise_to([3], [generation - 5])

    threads = [threading.Thread(target=raise_all, args=(first,)) for first in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert table.entries.tolist() == [399] * 64

"""KV blocks between two processes over NIXL, against memcpy of the same bytes in the same run.

    python -m benchmarks.transfer [--tokens 4096] [--repeats 5] [--transports cma tcp loopback] [--json FILE]

The default is the latent KV of a DeepSeek-V3-shaped model: 61 layers of 576 bf16 values a token, blocks of 64 tokens,
4.5 MB a block. The source's pool holds random bytes, and what arrives is compared. A pull goes through the executor,
generation check included; its blocks lie in random order at the source.

  warm   the best of `--repeats` pulls; a single-threaded memcpy of the same bytes follows each pull, so that a noisy
         neighbour hurts both, and the best of those is the bound
  cold   the very first pull of the process, which pays for every page fault on the sink's side; its bound is the first
         memcpy into fresh memory. Cold and warm are never compared with one another.

Transports: cma is what UCX chooses on one host, cross-process reads in the kernel; tcp is NIXL held to the loopback
device; loopback is our in-process double. Each has two processes of its own, the double one. GB/s are 1e9 bytes.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import MappingProxyType

import torch
from torch import Tensor

from benchmarks.process import ANSWER_S, process, receive
from benchmarks.report import Figure, Report, Setting, progress, publish
from cluster.protos import worker_pb2 as pb
from kvtransfer.connector import BlockPair, Connected, Done, Executor, Outcome, Pull, ReadLimits
from kvtransfer.layout import GroupSpec, KvGeometry, PageFormat, RankLayout, RegionSpec
from kvtransfer.loopback import LoopbackFabric, LoopbackTransport
from kvtransfer.pool import KvPool
from kvtransfer.transport import Transport

LIMITS = ReadLimits(late_read_s=60.0, stuck_read_s=120.0)
UCX_TLS: Mapping[str, str] = MappingProxyType({"cma": "auto", "tcp": "tcp,self"})
TRANSPORTS = (*UCX_TLS, "loopback")


@dataclass(frozen=True, slots=True)
class Shape:
    tokens: int = 4096
    layers: int = 61
    row_size: int = 576
    block_size: int = 64

    @property
    def num_blocks(self) -> int:
        return -(-self.tokens // self.block_size)

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.geometry().groups[0].block_bytes()

    def geometry(self) -> KvGeometry:
        region = RegionSpec(
            name="latents",
            num_layers=self.layers,
            page_format=PageFormat.ROWS,
            dtype="bfloat16",
            block_size=self.block_size,
            row_size=self.row_size,
        )
        return KvGeometry((GroupSpec("self", self.block_size, (region,)),), "interleaved")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one transport, in order; the first of each is cold."""

    warm_up_rate: float  # bytes/s, what a worker would report for this peer
    shuffled: list[float]
    contiguous: list[float]
    memcpy: list[float]  # each right behind a shuffled pull


# ---------------------------------------------------------------- the two sides


def make_pool(shape: Shape) -> KvPool:
    return KvPool.allocate(shape.geometry(), RankLayout(0), [shape.num_blocks])


def fill(pool: KvPool) -> None:
    """Random bytes, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    for storage in pool.regions[0]:
        storage.random_(0, 256, generator=generator)
    blocks = range(1, pool.num_blocks[0])
    pool.generations[0].raise_to(blocks, [1] * len(blocks))


def make_nixl(name: str, ucx_tls: str) -> Transport:
    from kvtransfer.nixl_transport import NixlTransport, prepare_environment

    prepare_environment(ucx_tls)
    return NixlTransport(f"{name}-{os.getpid()}/0")


def source_main(pipe: Connection, shape: Shape, ucx_tls: str) -> None:
    torch.set_num_threads(1)
    pool = make_pool(shape)
    fill(pool)
    executor = Executor(pool, make_nixl("source", ucx_tls), LIMITS, SimpleQueue[Done]().put)
    executor.start()
    pipe.send(executor.offer().SerializeToString())
    pipe.recv()
    executor.stop()


def sink_main(pipe: Connection, shape: Shape, ucx_tls: str, repeats: int) -> None:
    torch.set_num_threads(1)
    offer = pb.RankOffer.FromString(pipe.recv())
    pipe.send(pull_all(shape, make_nixl("sink", ucx_tls), offer, repeats))


def pull_all(shape: Shape, transport: Transport, offer: pb.RankOffer, repeats: int) -> Times:
    """In the sink's process: connects, pulls, compares, copies."""
    expected = make_pool(shape)
    fill(expected)
    wanted = expected.regions[0][0]
    pool = make_pool(shape)  # untouched, so that the first pull is cold
    storage = pool.regions[0][0]
    copy = torch.empty_like(wanted)
    dones: SimpleQueue[Done] = SimpleQueue()
    executor = Executor(pool, transport, LIMITS, dones.put)
    executor.start()
    try:
        link = _connect(executor, transport.name, offer)
        blocks = list(range(1, shape.num_blocks + 1))
        shuffled = random.Random(0).sample(blocks, len(blocks))
        times = Times(link.bytes_per_s, [], [], [])
        for round_ in range(repeats + 1):
            times.shuffled.append(_pull(executor, dones, 2 * round_, shuffled))
            _compare(storage, wanted, shuffled)
            started = time.perf_counter()
            copy[1:].copy_(wanted[1:])
            times.memcpy.append(time.perf_counter() - started)
            times.contiguous.append(_pull(executor, dones, 2 * round_ + 1, blocks))
            _compare(storage, wanted, blocks)
        return times
    finally:
        executor.stop()


def _connect(executor: Executor, transport: str, offer: pb.RankOffer) -> Connected:
    connected: SimpleQueue[Connected] = SimpleQueue()
    executor.connect("source", pb.TransportOffer(transport=transport, ranks=[offer]), connected.put)
    link = connected.get(timeout=ANSWER_S)
    if link.error is not None:
        raise link.error
    return link


def _pull(executor: Executor, dones: SimpleQueue[Done], pull_id: int, order: Sequence[int]) -> float:
    """Seconds from posting the pull to its completion, the generation check included."""
    pairs = tuple(BlockPair(0, source, sink) for sink, source in enumerate(order, 1))
    started = time.perf_counter()
    executor.submit(Pull(pull_id, "source", pairs, (1,) * len(pairs)))
    done = dones.get(timeout=ANSWER_S)
    seconds = time.perf_counter() - started
    assert done.outcome is Outcome.OK, done
    return seconds


def _compare(storage: Tensor, wanted: Tensor, order: Sequence[int]) -> None:
    """And overwrites what came, so that the next pull has something to prove."""
    for sink, source in enumerate(order, 1):
        assert torch.equal(storage[sink], wanted[source]), f"block {sink} differs"
    storage.zero_()


# ---------------------------------------------------------------- one transport


def measure(transport: str, shape: Shape, repeats: int) -> Times:
    """`transport` is one of TRANSPORTS."""
    if transport == "loopback":
        return _measure_loopback(shape, repeats)
    ucx_tls = UCX_TLS[transport]
    with process(source_main, shape, ucx_tls) as source, process(sink_main, shape, ucx_tls, repeats) as sink:
        sink.send(receive(source))
        times = receive(sink)
        source.send(None)
        return times


def _measure_loopback(shape: Shape, repeats: int) -> Times:
    fabric = LoopbackFabric()
    pool = make_pool(shape)
    fill(pool)
    source = Executor(pool, LoopbackTransport(fabric, "source"), LIMITS, SimpleQueue[Done]().put)
    source.start()
    try:
        return pull_all(shape, LoopbackTransport(fabric, "sink"), source.offer(), repeats)
    finally:
        source.stop()


def figures(transport: str, times: Times, num_bytes: int) -> list[Figure]:
    def best(seconds: list[float]) -> float:
        return num_bytes / min(seconds[1:]) / 1e9

    def cold(seconds: list[float]) -> float:
        return num_bytes / seconds[0] / 1e9

    each = [copy / pull for copy, pull in zip(times.memcpy[1:], times.shuffled[1:], strict=True)]
    median = f"median of {len(each)} rounds {statistics.median(each):.2f} of the memcpy beside it"
    memcpy = best(times.memcpy)
    return [
        Figure(f"{transport}, warm", best(times.shuffled), "GB/s", memcpy, note=median),
        Figure(f"{transport}, warm, blocks in order", best(times.contiguous), "GB/s", memcpy),
        Figure(f"{transport}, cold", cold(times.shuffled), "GB/s", cold(times.memcpy), note="first touch of the pages"),
        Figure(f"{transport}, as a worker warms up", times.warm_up_rate / 1e9, "GB/s", note="one block"),
    ]


def run(transports: Sequence[str], shape: Shape, repeats: int) -> Report:
    setting, found = Setting.here(), []
    details: dict[str, object] = {}
    for transport in transports:
        times = measure(transport, shape, repeats)
        found += figures(transport, times, shape.num_bytes)
        details[transport] = {"shuffled_s": times.shuffled, "contiguous_s": times.contiguous, "memcpy_s": times.memcpy}
        progress(f"transfer: {transport} done")
    return Report(
        benchmark="transfer",
        what=f"{shape.num_bytes / 1e6:.0f} MB of KV in {shape.num_blocks} blocks, random bytes; bound: memcpy",
        arguments={"tokens": shape.tokens, "layers": shape.layers, "row_size": shape.row_size, "repeats": repeats},
        figures=found,
        setting=setting,
        details=details,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=Shape().tokens)
    parser.add_argument("--layers", type=int, default=Shape().layers)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = run(options.transports, Shape(options.tokens, options.layers), options.repeats)
    publish(report, options.json)


if __name__ == "__main__":
    main()

"""KV blocks between two processes over NIXL, against memcpy of the same bytes in the same run.

    python -m benchmarks.transfer [--tokens 4096] [--repeats 5] [--ucx-tls auto] [--json FILE]

The default is the latent KV of a DeepSeek-V3-shaped model: 61 layers of 576 bf16 values a token, blocks of 64 tokens,
4.5 MB a block. The source's pool holds random bytes; the pull goes through the executor, generation check included.
Copies and pulls alternate, so that a noisy neighbour hurts both; the best of each counts. Prints GB/s (1e9 bytes).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch

from cluster.protos import worker_pb2 as pb
from kvtransfer.connector import BlockPair, Connected, Done, Executor, Outcome, Pull, ReadLimits
from kvtransfer.layout import GroupSpec, KvGeometry, PageFormat, RankLayout, RegionSpec
from kvtransfer.pool import KvPool

LIMITS = ReadLimits(late_read_s=60.0, stuck_read_s=120.0)
ANSWER_S = 180.0


@dataclass(frozen=True, slots=True)
class Shape:
    tokens: int = 4096
    layers: int = 61
    row_size: int = 576
    block_size: int = 64

    @property
    def num_blocks(self) -> int:
        return -(-self.tokens // self.block_size)

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
class Figures:
    machine: str
    shape: Shape
    ucx_tls: str
    megabytes: float
    warm_up_gb_per_s: float  # what a worker would report for this peer
    contiguous_gb_per_s: float  # source and sink blocks in order
    shuffled_gb_per_s: float  # source blocks in random order
    memcpy_gb_per_s: float
    ratio: float  # shuffled / memcpy


def make_rank(name: str, shape: Shape, ucx_tls: str, on_done: SimpleQueue[Done]) -> tuple[KvPool, Executor]:
    from kvtransfer.nixl_transport import NixlTransport, prepare_environment

    prepare_environment(ucx_tls)
    pool = KvPool.allocate(shape.geometry(), RankLayout(0), [shape.num_blocks])
    executor = Executor(pool, NixlTransport(f"{name}-{os.getpid()}/0"), LIMITS, on_done.put)
    executor.start()
    return pool, executor


def fill(pool: KvPool) -> None:
    generator = torch.Generator().manual_seed(0)
    for storage in pool.regions[0]:
        storage.random_(0, 256, generator=generator)
    blocks = range(1, pool.num_blocks[0])
    pool.generations[0].raise_to(blocks, [1] * len(blocks))


def source_main(pipe: Connection, shape: Shape, ucx_tls: str) -> None:
    torch.set_num_threads(1)
    pool, executor = make_rank("source", shape, ucx_tls, SimpleQueue())
    fill(pool)
    pipe.send(executor.offer().SerializeToString())
    pipe.recv()
    executor.stop()


def measure(shape: Shape, ucx_tls: str, repeats: int) -> Figures:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    source = context.Process(target=source_main, args=(theirs, shape, ucx_tls), daemon=True)
    source.start()
    dones: SimpleQueue[Done] = SimpleQueue()
    pool, executor = make_rank("sink", shape, ucx_tls, dones)
    expected = KvPool.allocate(shape.geometry(), RankLayout(0), [shape.num_blocks])
    fill(expected)
    copy = torch.ones_like(expected.regions[0][0])
    if not pipe.poll(ANSWER_S):
        raise TimeoutError("the source process did not come up")
    connected: SimpleQueue[Connected] = SimpleQueue()
    offer = pb.TransportOffer(transport="nixl", ranks=[pb.RankOffer.FromString(pipe.recv())])
    executor.connect("source", offer, connected.put)
    link = connected.get(timeout=ANSWER_S)
    if link.error is not None:
        raise link.error

    blocks = list(range(1, shape.num_blocks + 1))
    shuffled = random.Random(0).sample(blocks, len(blocks))
    rates: dict[str, list[float]] = {"contiguous": [], "shuffled": [], "memcpy": []}
    num_bytes = shape.num_blocks * shape.geometry().groups[0].block_bytes()
    storage = pool.regions[0][0]
    # The first round pays for page faults on both sides and is not counted.
    for round_ in range(repeats + 1):
        for name, order in (("contiguous", blocks), ("shuffled", shuffled)):
            storage.zero_()
            pairs = tuple(BlockPair(0, a, b) for a, b in zip(order, blocks, strict=True))
            started = time.perf_counter()
            executor.submit(Pull(round_, "source", pairs, (1,) * len(pairs)))
            done = dones.get(timeout=ANSWER_S)
            rates[name].append(num_bytes / (time.perf_counter() - started) / 1e9)
            assert done.outcome is Outcome.OK, done
            assert torch.equal(storage[1:], expected.regions[0][0][order]), "bytes differ"
        started = time.perf_counter()
        copy[1:].copy_(expected.regions[0][0][1:])
        rates["memcpy"].append(num_bytes / (time.perf_counter() - started) / 1e9)
    pipe.send("stop")
    source.join(ANSWER_S)
    executor.stop()
    best = {name: max(values[1:]) for name, values in rates.items()}
    return Figures(
        machine=f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        shape=shape,
        ucx_tls=ucx_tls,
        megabytes=num_bytes / 1e6,
        warm_up_gb_per_s=link.bytes_per_s / 1e9,
        contiguous_gb_per_s=best["contiguous"],
        shuffled_gb_per_s=best["shuffled"],
        memcpy_gb_per_s=best["memcpy"],
        ratio=best["shuffled"] / best["memcpy"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=Shape().tokens)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ucx-tls", default="auto")
    parser.add_argument("--json", help="write the figures here, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(Shape(tokens=arguments.tokens), arguments.ucx_tls, arguments.repeats)
    for name, value in asdict(figures).items():
        print(f"{name:>22}  {value:.2f}" if isinstance(value, float) else f"{name:>22}  {value}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(asdict(figures), file, indent=2)


if __name__ == "__main__":
    main()

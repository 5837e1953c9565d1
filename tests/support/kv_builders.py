"""Small workers for tests of KV transfer: real block manager, ledger, planner, executors and byte buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from kvtransfer.connector import (
    BlockRun,
    BlockSpan,
    Connected,
    Done,
    Executor,
    Pull,
    PullResult,
    ReadLimits,
    Sink,
    Source,
)
from kvtransfer.layout import GroupSpec, KvGeometry, PageFormat, RankLayout, RegionSpec
from kvtransfer.ledger import Ledger
from kvtransfer.loopback import LoopbackFabric, LoopbackRead, LoopbackTransport
from kvtransfer.pool import KvPool
from kvtransfer.transport import Transport
from workers.engine.block_manager import BlockManager, GroupCapacity

T_S = 5.0
STUCK_S = 15.0
LEASE_S = 10.0
KEY = RequestKey("request", 0)


class Clock:
    """Seconds that move only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def latent_geometry(*, num_layers: int = 2, block_size: int = 4, row_size: int = 4) -> KvGeometry:
    """One group with latents and an fp8 indexer beside them."""
    latents = RegionSpec(
        name="latents",
        num_layers=num_layers,
        page_format=PageFormat.ROWS,
        dtype="float16",
        block_size=block_size,
        row_size=row_size,
    )
    indexer = RegionSpec(
        name="indexer",
        num_layers=num_layers,
        page_format=PageFormat.FP8_VALUES_THEN_SCALES,
        dtype="float8_e4m3fn",
        block_size=block_size,
        row_size=row_size,
        scales_per_row=1,
    )
    return KvGeometry((GroupSpec("self", block_size, (latents, indexer)),), "interleaved")


def heads_geometry(*, kv_heads: int = 4, num_layers: int = 2) -> KvGeometry:
    """Two groups: K/V by heads with a replicated region beside them, and `cross` with K/V of its own."""

    def heads(name: str, block_size: int) -> RegionSpec:
        return RegionSpec(
            name=name,
            num_layers=num_layers,
            page_format=PageFormat.KV_HEADS_FIRST,
            dtype="float16",
            block_size=block_size,
            kv_heads=kv_heads,
            head_dim=4,
        )

    draft = RegionSpec(
        name="draft", num_layers=1, page_format=PageFormat.ROWS, dtype="float16", block_size=4, row_size=4
    )
    return KvGeometry((GroupSpec("self", 4, (heads("kv", 4), draft)), GroupSpec("cross", 2, (heads("kv", 2),))), "none")


def logical_block(region: RegionSpec, content: int) -> np.ndarray:
    """The bytes of one unsharded block that stand for `content`; no two contents share a byte sequence.

    uint8 [num_layers, 2, kv_heads, head bytes] for K/V by heads, [bytes] otherwise.
    """
    num_bytes = region.block_bytes()
    words = np.arange(-(-num_bytes // 8), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    block = (words ^ np.uint64(content + 1)).view(np.uint8)[:num_bytes]
    if region.page_format is PageFormat.KV_HEADS_FIRST:
        return block.reshape(region.num_layers, 2, region.kv_heads, region.head_bytes)
    return block


def sharded_block(region: RegionSpec, content: int, tp_rank: int, tp_size: int) -> np.ndarray:
    """What one rank holds of it: uint8 [num_layers, page_bytes]."""
    block = logical_block(region, content)
    if region.page_format is PageFormat.KV_HEADS_FIRST:
        if tp_size <= region.kv_heads:
            block = np.split(block, tp_size, axis=2)[tp_rank]
        else:
            block = block[:, :, [tp_rank * region.kv_heads // tp_size]]
    return np.ascontiguousarray(block).reshape(region.num_layers, region.page_bytes(tp_size))


@dataclass(slots=True)
class KvRank:
    pool: KvPool
    transport: LoopbackTransport
    executor: Executor


@dataclass(slots=True)
class KvWorker:
    """One worker over loopback, driven by hand: `pump` runs its executors and hands their Dones to the planner."""

    name: str
    clock: Clock
    blocks: BlockManager
    ledger: Ledger
    source: Source
    sink: Sink
    ranks: list[KvRank]
    dones: list[Done]
    late_read_s: float
    connected: list[Connected] = field(default_factory=list)

    @classmethod
    def build(
        cls,
        name: str,
        fabric: LoopbackFabric,
        clock: Clock,
        *,
        geometry: KvGeometry | None = None,
        tp_size: int = 1,
        num_blocks: int = 8,
        prefix_cache: bool = True,
        late_read_s: float = T_S,
        ways: tuple[str, ...] = ("loopback",),
        over: Callable[[LoopbackTransport], Transport] | None = None,
    ) -> KvWorker:
        """`over`: makes the executors' transport of the loopback below it."""
        geometry = geometry or latent_geometry()
        blocks = BlockManager(
            [GroupCapacity(group.name, num_blocks, group.block_size) for group in geometry.groups],
            enable_prefix_cache=prefix_cache,
        )
        ledger = Ledger(blocks, lease_s=LEASE_S, late_read_s=T_S)
        dones: list[Done] = []
        ranks: list[KvRank] = []
        for rank in range(tp_size):
            pool = KvPool.allocate(geometry, RankLayout(rank, rank, tp_size), [num_blocks] * len(geometry.groups))
            transport = LoopbackTransport(fabric, f"{name}/{rank}", ways)
            used = transport if over is None else over(transport)
            executor = Executor(pool, used, ReadLimits(late_read_s, STUCK_S), dones.append, clock=clock)
            ranks.append(KvRank(pool, transport, executor))
        sink = Sink(ledger, range(tp_size))
        return cls(name, clock, blocks, ledger, Source(ledger), sink, ranks, dones, late_read_s)

    @property
    def agents(self) -> list[str]:
        return [rank.transport.agent for rank in self.ranks]

    def offer(self) -> pb.TransportOffer:
        ranks = [rank.executor.offer() for rank in self.ranks]
        return pb.TransportOffer(transport="loopback", ranks=ranks, late_read_ms=int(self.late_read_s * 1000))

    def connect(self, source: KvWorker) -> list[Connected]:
        """Connects every rank and runs the warm-up to its end."""
        self.connected.clear()
        for rank in self.ranks:
            rank.executor.connect(source.name, source.offer(), self.connected.append)
        while self.run_once():
            pass
        return list(self.connected)

    def run_once(self) -> bool:
        busy = [rank.executor.run_once() for rank in self.ranks]
        return any(busy)

    def submit(self, pull: Pull) -> None:
        for rank in self.ranks:
            rank.executor.submit(pull)

    def results(self) -> Iterator[PullResult]:
        """Hands what the executors reported to the planner, one after the other."""
        dones, self.dones[:] = list(self.dones), []
        for done in dones:
            result = self.sink.done(done, self.clock.now)
            if result is not None:
                yield result

    def settle(self) -> list[PullResult]:
        return list(self.results())

    def pump(self) -> list[PullResult]:
        self.run_once()
        return self.settle()

    def write(self, group: int, block: int, content: int) -> None:
        """What a step does to a block: generations first, then the bytes, on every rank."""
        self.raise_generations()
        for rank in self.ranks:
            layout = rank.pool.layout
            specs = rank.pool.geometry.groups[group].regions
            for region, storage in zip(specs, rank.pool.regions[group], strict=True):
                storage[block].numpy()[:] = sharded_block(region, content, layout.tp_rank, layout.tp_size)

    def raise_generations(self) -> None:
        raises = self.blocks.drain_raises()
        for rank in self.ranks:
            for group, table in enumerate(rank.pool.generations):
                mine = [(each.block, each.generation) for each in raises if each.group == group]
                if mine:
                    table.raise_to(*zip(*mine, strict=True))

    def holds(self, group: int, block: int, content: int) -> bool:
        """Whether every rank has exactly the bytes of `content` in that block."""
        for rank in self.ranks:
            layout = rank.pool.layout
            specs = rank.pool.geometry.groups[group].regions
            for region, storage in zip(specs, rank.pool.regions[group], strict=True):
                wanted = sharded_block(region, content, layout.tp_rank, layout.tp_size)
                if not np.array_equal(storage[block].numpy(), wanted):
                    return False
        return True

    def reserve(self, count: int, *, group: int = 0) -> list[int]:
        counts = [count if index == group else 0 for index in range(len(self.blocks.groups))]
        blocks = self.blocks.reserve(counts, for_transfer=True)
        assert blocks is not None
        return blocks[group]

    def filled(self, contents: Sequence[int], *, group: int = 0) -> list[int]:
        """READY blocks, without hash, that hold these contents; one reference each, the caller's."""
        blocks = self.reserve(len(contents), group=group)
        for block, content in zip(blocks, contents, strict=True):
            self.write(group, block, content)
            self.blocks.mark_ready(group, block, None)
        return blocks

    def publish(self, key: RequestKey, session: str, blocks: Sequence[int], *, group: int = 0) -> tuple[BlockRun, ...]:
        return self.source.publish(key, session, [BlockSpan(group, 0, tuple(blocks))], self.clock.now)

    def pull(self, key: RequestKey, source: str, runs: Sequence[BlockRun], blocks: Sequence[int]) -> Pull:
        """Plans the runs of group g = runs[i].span.group into `blocks`, from position 0, and submits to every rank."""
        group = runs[0].span.group
        raises = self.blocks.raises_of(group, blocks)
        pull = self.sink.plan(key, source, runs, [BlockSpan(group, 0, tuple(blocks))], raises, self.clock.now)
        self.submit(pull)
        return pull

    def check_integrity(self) -> None:
        self.blocks.check_integrity()
        self.ledger.check_integrity()
        self.sink.check_integrity()


class KvPair:
    """A source and a connected sink, over a fabric of their own."""

    def __init__(
        self, *, source_tp: int = 1, sink_tp: int = 1, geometry: KvGeometry | None = None, late_read_s: float = T_S
    ) -> None:
        self.fabric = LoopbackFabric()
        self.clock = Clock()
        self.source, self.sink = (
            KvWorker.build(name, self.fabric, self.clock, geometry=geometry, tp_size=tp_size, late_read_s=late_read_s)
            for name, tp_size in (("source", source_tp), ("sink", sink_tp))
        )
        assert all(each.error is None for each in self.sink.connect(self.source))

    def start(self, contents: list[int], *, group: int = 0) -> tuple[list[int], list[int], Pull]:
        """A leased prompt on the source, and its pull, submitted."""
        theirs = self.source.filled(contents, group=group)
        runs = self.source.publish(KEY, "session", theirs, group=group)
        ours = self.sink.reserve(len(contents), group=group)
        return theirs, ours, self.sink.pull(KEY, "source", runs, ours)

    def hold(self) -> None:
        for agent in self.source.agents:
            self.fabric.hold(agent)

    def reads(self) -> list[LoopbackRead]:
        return [read for rank in self.sink.ranks for read in rank.transport.reads.values()]

    def check(self) -> None:
        self.source.check_integrity()
        self.sink.check_integrity()

"""One source as seen by one sink rank: its offer checked, and all descriptors of both pools prepared.

Per source rank two pairs of prepared lists; row i of a local list fills from row i's partner of the remote one:

    data: for each region, for each slice of the reshard plan from this source rank: one row per block
    generations, which are in host memory on both sides: for each group one row per entry of the table
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.errors import TransferError
from cluster.protos import worker_pb2 as pb
from kvtransfer.layout import KvGeometry, RankLayout, RegionSpec, Slice, reshard_plan
from kvtransfer.pool import NULL_BLOCK, KvPool
from kvtransfer.pull import BlockPair, Pull, names_together
from kvtransfer.transport import HOST, AgentOffer, Indices, MemorySpan, PreparedId, Transport

GENERATION_BYTES = 8


def device_code(device: torch.device) -> int:
    return HOST if device.type == "cpu" else (device.index or 0) + 1


def span_of(tensor: torch.Tensor) -> MemorySpan:
    return MemorySpan(tensor.data_ptr(), tensor.numel() * tensor.element_size(), device_code(tensor.device))


def rank_offer(pool: KvPool, shard: int, agent: AgentOffer) -> pb.RankOffer:
    """What peers need to read this rank's pool."""
    offer = pb.RankOffer(
        rank=pool.layout.rank,
        shard=shard,
        tp_rank=pool.layout.tp_rank,
        tp_size=pool.layout.tp_size,
        agent=agent.agent,
        metadata=agent.metadata,
        ipc=agent.ipc,
    )
    for group in range(len(pool.regions)):
        for region, storage in pool.travelling(group):
            offer.regions.append(_region_offer(group, region.name, storage))
        offer.generations.append(_region_offer(group, "generations", pool.generations[group].entries))
    return offer


def _agent_offer(rank: pb.RankOffer) -> AgentOffer:
    return AgentOffer(rank.agent, rank.metadata, rank.ipc if rank.HasField("ipc") else None)


def _region_offer(group: int, name: str, storage: torch.Tensor) -> pb.RegionOffer:
    return pb.RegionOffer(
        group=group,
        name=name,
        address=storage.data_ptr(),
        num_blocks=len(storage),
        block_bytes=storage[0].numel() * storage.element_size(),
        device=device_code(storage.device),
    )


class Landing:
    """Where the generations that a check reads arrive: lanes[source rank][group], int64 [num_blocks of the sink].

    An entry belongs to its sink block, so that reads in flight, which own their destination blocks, never share one.
    """

    def __init__(self, pool: KvPool, transport: Transport) -> None:
        self._pool = pool
        self._transport = transport
        self._lanes: list[list[torch.Tensor]] = []

    def lane(self, index: int) -> list[torch.Tensor]:
        """Grows, and registers, on demand: one lane per source rank of the widest peer."""
        while len(self._lanes) <= index:
            tables = [torch.zeros_like(table.entries) for table in self._pool.generations]
            for table in tables:
                self._transport.register(span_of(table))
            self._lanes.append(tables)
        return self._lanes[index]


@dataclass(frozen=True, slots=True)
class ReadOrder:
    """The arguments of one Transport.read."""

    local: PreparedId
    local_rows: Indices
    remote: PreparedId
    remote_rows: Indices


@dataclass(slots=True)
class _Rows:
    """Descriptors of one side while they are collected."""

    blocks: list[NDArray[np.uint64]]
    num_rows: int = 0

    def add(self, region: pb.RegionOffer, offset: int, num_bytes: int) -> int:
        """`num_bytes` at `offset` of each block; returns the first row's index."""
        count = region.num_blocks
        rows = np.empty((count, 3), np.uint64)
        strides = np.arange(count, dtype=np.uint64) * np.uint64(region.block_bytes)
        rows[:, 0] = np.uint64(region.address + offset) + strides
        rows[:, 1], rows[:, 2] = num_bytes, region.device
        self.blocks.append(rows)
        self.num_rows += count
        return self.num_rows - count

    def all(self) -> NDArray[np.uint64]:
        return np.concatenate(self.blocks)


class _RowPairs:
    """Both sides' rows, alike in memory kind. `bases[group]`: first rows (local, remote) of each slice."""

    def __init__(self, num_groups: int) -> None:
        self.bases: list[list[tuple[int, int]]] = [[] for _ in range(num_groups)]
        self._local_rows = _Rows([])
        self._remote_rows = _Rows([])
        self._local = PreparedId(0)
        self._remote = PreparedId(0)

    def add(self, group: int, local: pb.RegionOffer, remote: pb.RegionOffer, piece: Slice) -> None:
        """A row per block: `piece` of it."""
        self.bases[group].append(
            (
                self._local_rows.add(local, piece.sink_offset, piece.num_bytes),
                self._remote_rows.add(remote, piece.source_offset, piece.num_bytes),
            )
        )

    def ways(self, transport: Transport) -> tuple[str, ...]:
        return transport.ways(self._remote)

    def choose(self, transport: Transport, way: str) -> None:
        if way in self.ways(transport):
            transport.choose(self._remote, way)

    def prepare(self, transport: Transport, agent: str) -> None:
        self._local = transport.prepare(None, self._local_rows.all())
        self._remote = transport.prepare(agent, self._remote_rows.all())

    def discard(self, transport: Transport) -> None:
        for prepared in (self._local, self._remote):
            if prepared:
                transport.discard(prepared)
        self._local = self._remote = PreparedId(0)

    def order(self, pairs: Sequence[BlockPair]) -> ReadOrder | None:
        local: list[NDArray[np.int64]] = []
        remote: list[NDArray[np.int64]] = []
        by_group: dict[int, list[BlockPair]] = {}
        for pair in pairs:
            by_group.setdefault(pair.group, []).append(pair)
        for group, members in by_group.items():
            # Sorted by source address, because transports merge neighbours.
            blocks = np.array(sorted((pair.source_block, pair.sink_block) for pair in members), np.int64)
            for local_base, remote_base in self.bases[group]:
                local.append(blocks[:, 1] + local_base)
                remote.append(blocks[:, 0] + remote_base)
        if not local:
            return None
        return ReadOrder(
            self._local,
            np.concatenate(local).astype(np.int32),
            self._remote,
            np.concatenate(remote).astype(np.int32),
        )


class _SourceRank:
    """What this sink rank reads from one source rank."""

    def __init__(self, offer: pb.RankOffer, num_groups: int) -> None:
        self.offer = offer
        self.agent = ""
        self.data = _RowPairs(num_groups)
        self.generations = _RowPairs(num_groups)
        self.bytes_per_block = [0] * num_groups
        self.landing: list[torch.Tensor] = []


class Link:
    """Owns the prepared lists of one peer until `close`. Bytes thread only.

    Raises TransferError, with both geometries, when the offer does not fit this rank's pool, and what the transport
    raises. Blocks while the transport connects.
    """

    def __init__(
        self, peer: str, offer: pb.TransportOffer, shard: int, pool: KvPool, landing: Landing, transport: Transport
    ) -> None:
        self.peer = peer
        self.late_read_s = offer.late_read_ms / 1000 if offer.late_read_ms else None
        self.num_in_flight = 0  # jobs that use the prepared lists; kept by the executor
        self._pool = pool
        self._transport = transport
        ranks = {rank.rank: rank for rank in offer.ranks if rank.shard == shard}
        if not ranks:
            raise TransferError(f"{peer} offers no rank of shard {shard}")
        self.num_source_blocks = _checked(peer, list(ranks.values()), pool)
        num_groups = len(pool.geometry.groups)
        self._sources = [_SourceRank(ranks[rank], num_groups) for rank in sorted(ranks)]
        try:
            self._collect_rows(landing)
        except ValueError as error:
            raise TransferError(f"the ranks that {peer} offers do not make up its KV: {error}") from error
        # A source rank that holds nothing this rank needs is neither connected nor asked.
        self._sources = [source for source in self._sources if any(source.data.bases)]
        try:
            for source in self._sources:
                source.agent = transport.connect(_agent_offer(source.offer))
                source.data.prepare(transport, source.agent)
                source.generations.prepare(transport, source.agent)
        except TransferError:
            self.close()
            raise

    @property
    def transport(self) -> str:
        """What moves the data."""
        return names_together(source.data.ways(self._transport)[0] for source in self._sources)

    @property
    def ways(self) -> tuple[str, ...]:
        """What can move the data of some source rank: in use first, then others to choose from."""
        return tuple(dict.fromkeys(way for source in self._sources for way in source.data.ways(self._transport)))

    def choose(self, way: str) -> None:
        """For the source ranks that can be read so; the others stay as they are."""
        for source in self._sources:
            source.data.choose(self._transport, way)

    def bytes_of(self, pairs: Sequence[BlockPair]) -> int:
        return sum(source.bytes_per_block[pair.group] for source in self._sources for pair in pairs)

    def data_orders(self, pairs: Sequence[BlockPair]) -> list[ReadOrder]:
        """Reads that fill the sink blocks on this rank. Raises TransferError for a block outside the pools."""
        self._check(pairs)
        orders = [source.data.order(pairs) for source in self._sources]
        return [order for order in orders if order]

    def generation_orders(self, pairs: Sequence[BlockPair]) -> list[ReadOrder]:
        """Reads of the entries of the source blocks, from each source rank that the data come from."""
        orders: list[ReadOrder] = []
        for source in self._sources:
            order = source.generations.order([pair for pair in pairs if source.data.bases[pair.group]])
            if order:
                orders.append(order)
        return orders

    def stale(self, pull: Pull) -> tuple[int, ...]:
        """Indices of the pairs whose generation, as it has landed from some source rank, is not the pull's."""
        differing: set[int] = set()
        for group in {pair.group for pair in pull.pairs}:
            members = [index for index, pair in enumerate(pull.pairs) if pair.group == group]
            blocks = torch.tensor([pull.pairs[index].sink_block for index in members])
            for source in self._sources:
                if source.data.bases[group]:
                    landed = source.landing[group][blocks].tolist()
                    differing.update(i for i, seen in zip(members, landed, strict=True) if seen != pull.generations[i])
        return tuple(sorted(differing))

    def warm_up_pairs(self, num_bytes: int, max_pairs: int) -> list[BlockPair]:
        """The null blocks, repeated until they come to `num_bytes`: nobody minds what is written there."""
        once = [BlockPair(group, NULL_BLOCK, NULL_BLOCK) for group in range(len(self._pool.geometry.groups))]
        repeats = max(1, min(num_bytes // max(1, self.bytes_of(once)), max_pairs))
        return once * repeats

    def close(self) -> None:
        """Only when no read is in flight. Idempotent."""
        for source in self._sources:
            source.data.discard(self._transport)
            source.generations.discard(self._transport)
            if source.agent:
                self._transport.disconnect(source.agent)
                source.agent = ""

    def _collect_rows(self, landing: Landing) -> None:
        pool = self._pool
        by_rank = {source.offer.rank: source for source in self._sources}
        layouts = [RankLayout(s.offer.rank, s.offer.tp_rank, s.offer.tp_size) for s in self._sources]
        for group in range(len(pool.regions)):
            for region, storage in pool.travelling(group):
                local = _region_offer(group, region.name, storage)
                for piece in reshard_plan(region, layouts, pool.layout):
                    source = by_rank[piece.source_rank]
                    source.data.add(group, local, _offered(source.offer, group, region.name), piece)
                    source.bytes_per_block[group] += piece.num_bytes
        used = [source for source in self._sources if any(source.data.bases)]
        for lane, source in enumerate(used):
            source.landing = landing.lane(lane)
            for group, table in enumerate(source.landing):
                here = _region_offer(group, "landing", table)
                there = _generations(source.offer, group)
                assert there is not None
                source.generations.add(group, here, there, Slice(source.offer.rank, 0, 0, GENERATION_BYTES))

    def _check(self, pairs: Sequence[BlockPair]) -> None:
        sink_blocks = self._pool.num_blocks
        for group, source_block, sink_block in pairs:
            if not 0 <= group < len(sink_blocks):
                raise TransferError(f"group {group} of a pull from {self.peer}; there are {len(sink_blocks)}")
            if not 0 <= source_block < self.num_source_blocks[group]:
                raise TransferError(
                    f"block {source_block} of group {group}; {self.peer} has {self.num_source_blocks[group]}"
                )
            assert 0 <= sink_block < sink_blocks[group]


def _checked(peer: str, ranks: Sequence[pb.RankOffer], pool: KvPool) -> list[int]:
    """Blocks per group of a source whose offer fits the sink's geometry; raises TransferError otherwise."""
    geometry = pool.geometry
    num_blocks: list[int] = []
    for group, spec in enumerate(geometry.groups):
        counts: set[int] = set()
        for rank in ranks:
            for region in spec.travelling:
                offered = _offered_or_none(rank, group, region.name)
                if offered is None or offered.block_bytes != _block_bytes(region, rank):
                    raise _mismatch(peer, rank, geometry)
                counts.add(offered.num_blocks)
            table = _generations(rank, group)
            if table is None or table.block_bytes != GENERATION_BYTES:
                raise _mismatch(peer, rank, geometry)
            counts.add(table.num_blocks)
            if len({(region.group, region.name) for region in rank.regions}) != sum(
                len(other.travelling) for other in geometry.groups
            ):
                raise _mismatch(peer, rank, geometry)
        if len(counts) != 1:
            raise TransferError(f"{peer}: group {spec.name} has regions of {sorted(counts)} blocks; they must be equal")
        num_blocks.append(counts.pop())
    return num_blocks


def _block_bytes(region: RegionSpec, rank: pb.RankOffer) -> int:
    try:
        return region.block_bytes(rank.tp_size)
    except ValueError as error:
        raise TransferError(f"rank {rank.rank} of the source: {error}") from error


def _mismatch(peer: str, rank: pb.RankOffer, geometry: KvGeometry) -> TransferError:
    theirs = [f"{region.group}/{region.name}: {region.block_bytes} B a block" for region in rank.regions]
    ours = [
        f"{group}/{region.name}: {region.block_bytes(rank.tp_size)} B a block"
        for group, spec in enumerate(geometry.groups)
        for region in spec.travelling
    ]
    return TransferError(
        f"KV geometry of {peer} (rank {rank.rank}, tp {rank.tp_rank}/{rank.tp_size}) is [{'; '.join(theirs)}], "
        f"this worker's at that tp size is [{'; '.join(ours)}] ({geometry.canonical()}); start both with the same "
        "model, dtype and kv.block_size"
    )


def _offered_or_none(rank: pb.RankOffer, group: int, name: str) -> pb.RegionOffer | None:
    return next((region for region in rank.regions if (region.group, region.name) == (group, name)), None)


def _offered(rank: pb.RankOffer, group: int, name: str) -> pb.RegionOffer:
    region = _offered_or_none(rank, group, name)
    assert region is not None
    return region


def _generations(rank: pb.RankOffer, group: int) -> pb.RegionOffer | None:
    return next((table for table in rank.generations if table.group == group), None)

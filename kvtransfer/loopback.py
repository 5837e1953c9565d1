"""A transport inside one process: copies memory when polled. Shipped, for tests and single-process runs.

It is as careless as the real ones: it copies whatever lies at a registered address. Faults are injected by agent
name on the fabric, which stands for the network:

    kill(agent)    its memory is gone: reads from it raise PeerLost, pending ones too
    hold(agent)    reads from it stay PENDING until `resume`, or until a test moves them on with `LoopbackRead.copy`
    slow(agent, n) reads from it stay PENDING for n polls
    fail(agent)    the next read from it fails with a TransferError
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass, field

from cluster.errors import NotRegistered, PeerLost, TransferError
from kvtransfer.transport import AgentOffer, Descriptors, Indices, MemorySpan, PreparedId, ReadId, ReadState


@dataclass(slots=True)
class LoopbackFabric:
    """The agents that can reach one another. The composition root makes one and hands it to each transport."""

    agents: dict[str, LoopbackTransport] = field(default_factory=dict)
    killed: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)
    delays: dict[tuple[str, str], int] = field(default_factory=dict)  # by agent and way

    def kill(self, agent: str) -> None:
        """For good: a restarted agent has another name."""
        self.killed.add(agent)

    def hold(self, agent: str) -> None:
        self.held.add(agent)

    def resume(self, agent: str) -> None:
        self.held.discard(agent)

    def fail(self, agent: str) -> None:
        self.failing.add(agent)

    def slow(self, agent: str, num_polls: int, way: str = "loopback") -> None:
        """Of reads posted from now on; 0 ends it."""
        self.delays[agent, way] = num_polls


@dataclass(slots=True)
class LoopbackRead:
    """A posted read: copies in order, `position` descriptors so far."""

    fabric: LoopbackFabric
    source: str
    copies: list[tuple[int, int, int]]  # destination, origin, bytes
    polls_left: int
    position: int = 0

    @property
    def num_left(self) -> int:
        return len(self.copies) - self.position

    def copy(self, num_descriptors: int | None = None) -> None:
        """Moves the next descriptors (None: all) now, whatever holds the read. Nothing comes from the dead."""
        if self.source in self.fabric.killed:
            return
        end = len(self.copies) if num_descriptors is None else self.position + num_descriptors
        for destination, origin, num_bytes in self.copies[self.position : end]:
            ctypes.memmove(destination, origin, num_bytes)
        self.position = min(end, len(self.copies))

    def poll(self) -> ReadState:
        if self.num_left == 0:
            return ReadState.COMPLETE
        if self.source in self.fabric.killed:
            raise PeerLost(f"agent {self.source} is gone")
        if self.source in self.fabric.failing:
            self.fabric.failing.discard(self.source)
            raise TransferError(f"injected failure of a read from {self.source}")
        if self.source in self.fabric.held:
            return ReadState.PENDING
        if self.polls_left > 0:
            self.polls_left -= 1
            return ReadState.PENDING
        self.copy()
        return ReadState.COMPLETE


@dataclass(slots=True)
class _Prepared:
    agent: str
    descriptors: list[tuple[int, int]]  # address, bytes
    ways: tuple[str, ...]


class LoopbackTransport:
    """Implements Transport. Copies happen on the thread that polls; `reads` are those posted and not yet released.
    All `ways` are alike until the fabric slows one down."""

    def __init__(self, fabric: LoopbackFabric, agent: str, ways: tuple[str, ...] = ("loopback",)) -> None:
        if agent in fabric.agents:
            raise TransferError(f"agent {agent!r} exists already: a restarted process needs another name")
        fabric.agents[agent] = self
        self.reads: dict[ReadId, LoopbackRead] = {}
        self._fabric = fabric
        self._agent = agent
        self._ways = ways
        self._spans: list[MemorySpan] = []
        self._prepared: dict[PreparedId, _Prepared] = {}
        self._peers: dict[str, list[MemorySpan]] = {}
        self._ids = itertools.count(1)

    @property
    def name(self) -> str:
        return "loopback"

    @property
    def agent(self) -> str:
        return self._agent

    def register(self, span: MemorySpan) -> None:
        self._spans.append(span)

    def offer(self) -> AgentOffer:
        return AgentOffer(self._agent, self._agent.encode())

    def connect(self, offer: AgentOffer) -> str:
        peer = self._fabric.agents.get(offer.agent)
        if peer is None or offer.agent in self._fabric.killed:
            raise PeerLost(f"agent {offer.agent!r} is not in this process; loopback reaches no further")
        self._peers[offer.agent] = list(peer._spans)
        return offer.agent

    def prepare(self, peer: str | None, descriptors: Descriptors) -> PreparedId:
        if peer is not None and peer not in self._peers:
            raise TransferError(f"agent {peer!r} is not connected")
        spans = self._spans if peer is None else self._peers[peer]
        rows = [(int(address), int(num_bytes)) for address, num_bytes, _ in descriptors.tolist()]
        for address, num_bytes in rows:
            if not any(s.address <= address and address + num_bytes <= s.address + s.num_bytes for s in spans):
                raise NotRegistered(f"{num_bytes} bytes at {address:#x} of {peer or self._agent} are not registered")
        prepared = PreparedId(next(self._ids))
        self._prepared[prepared] = _Prepared(peer or self._agent, rows, self._ways)
        return prepared

    def discard(self, prepared: PreparedId) -> None:
        self._prepared.pop(prepared, None)

    def ways(self, remote: PreparedId) -> tuple[str, ...]:
        return self._prepared[remote].ways

    def choose(self, remote: PreparedId, way: str) -> None:
        entry = self._prepared[remote]
        assert way in entry.ways
        entry.ways = (way, *(each for each in entry.ways if each != way))

    def read(self, local: PreparedId, local_rows: Indices, remote: PreparedId, remote_rows: Indices) -> ReadId:
        here, there = self._prepared[local], self._prepared[remote]
        assert here.agent == self._agent and len(local_rows) == len(remote_rows)
        if there.agent in self._fabric.killed:
            raise PeerLost(f"agent {there.agent} is gone")
        copies: list[tuple[int, int, int]] = []
        for to, origin in zip(local_rows.tolist(), remote_rows.tolist(), strict=True):
            destination, num_bytes = here.descriptors[to]
            address, remote_bytes = there.descriptors[origin]
            assert num_bytes == remote_bytes, "rows pair up in size"
            copies.append((destination, address, num_bytes))
        read = ReadId(next(self._ids))
        polls = self._fabric.delays.get((there.agent, there.ways[0]), 0)
        self.reads[read] = LoopbackRead(self._fabric, there.agent, copies, polls)
        return read

    def poll(self, read: ReadId) -> ReadState:
        return self.reads[read].poll()

    def release(self, read: ReadId) -> None:
        self.reads.pop(read, None)

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)
        for prepared in [key for key, value in self._prepared.items() if value.agent == peer]:
            del self._prepared[prepared]

    def close(self) -> None:
        """Peers find this agent gone."""
        self._fabric.kill(self._agent)
        self._peers.clear()
        self._prepared.clear()
        self.reads.clear()

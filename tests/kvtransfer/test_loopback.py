"""The in-process double: as strict and as careless as the real transports."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.errors import NotRegistered, PeerLost, TransferError
from kvtransfer.loopback import LoopbackFabric, LoopbackTransport
from kvtransfer.transport import AgentOffer, MemorySpan, ReadState


class Ends:
    """Two agents with 64 bytes each, prepared in rows of 8."""

    def __init__(self) -> None:
        self.fabric = LoopbackFabric()
        self.source, self.sink = (LoopbackTransport(self.fabric, name) for name in ("source", "sink"))
        self.theirs = np.arange(64, dtype=np.uint8)
        self.ours = np.zeros(64, np.uint8)
        self.source.register(self.span(self.theirs))
        self.sink.register(self.span(self.ours))
        self.peer = self.sink.connect(self.source.offer())
        self.local = self.sink.prepare(None, self.rows(self.ours))
        self.remote = self.sink.prepare(self.peer, self.rows(self.theirs))

    @staticmethod
    def span(memory: np.ndarray) -> MemorySpan:
        return MemorySpan(memory.ctypes.data, memory.nbytes)

    @staticmethod
    def rows(memory: np.ndarray) -> np.ndarray:
        return np.array([[memory.ctypes.data + start, 8, 0] for start in range(0, 64, 8)], np.uint64)

    def read(self, into: list[int], origin: list[int]):
        return self.sink.read(self.local, np.array(into, np.int32), self.remote, np.array(origin, np.int32))


def test_nothing_moves_before_a_poll_or_a_copy() -> None:
    ends = Ends()
    read = ends.read([7, 0], [1, 2])
    assert not ends.ours.any()
    ends.sink.reads[read].copy(1)
    assert ends.ours[56:].tolist() == list(range(8, 16)) and not ends.ours[:56].any()
    ends.theirs[16:24] = 9
    assert ends.sink.poll(read) is ReadState.COMPLETE
    assert ends.ours[:8].tolist() == [9] * 8, "whatever lies there when it is copied"
    ends.sink.release(read)
    ends.sink.release(read)
    assert ends.sink.reads == {}


def test_slow_and_held_reads_are_pending() -> None:
    ends = Ends()
    ends.fabric.slow("source", 2)
    read = ends.read([0], [1])
    assert [ends.sink.poll(read) for _ in range(3)] == [ReadState.PENDING] * 2 + [ReadState.COMPLETE]
    ends.fabric.slow("source", 0)
    ends.fabric.hold("source")
    read = ends.read([1], [2])
    assert {ends.sink.poll(read) for _ in range(100)} == {ReadState.PENDING}
    ends.fabric.resume("source")
    assert ends.sink.poll(read) is ReadState.COMPLETE


def test_the_dead_send_nothing() -> None:
    ends = Ends()
    read = ends.read([0], [1])
    ends.source.close()
    with pytest.raises(PeerLost, match="source"):
        ends.sink.poll(read)
    ends.sink.reads[read].copy()
    assert not ends.ours.any()
    with pytest.raises(PeerLost):
        ends.read([0], [1])
    with pytest.raises(PeerLost, match="no further"):
        ends.sink.connect(AgentOffer("source", b"source"))


def test_memory_that_is_not_registered_is_refused() -> None:
    ends = Ends()
    outside = ends.rows(ends.theirs)
    outside[7, 1] = 9
    with pytest.raises(NotRegistered, match="9 bytes"):
        ends.sink.prepare(ends.peer, outside)
    with pytest.raises(TransferError, match="not connected"):
        ends.sink.prepare("nobody", ends.rows(ends.theirs))


def test_an_agent_name_is_used_once() -> None:
    ends = Ends()
    ends.source.close()
    with pytest.raises(TransferError, match="another name"):
        LoopbackTransport(ends.fabric, "source")

"""Blocks between GPUs of one host: memory of the other process opened by CUDA IPC, read by one kernel per pull.

    device memory of this host   ─> opened by the reading device, gathered on a stream of its own
    host memory, and other hosts ─> the transport below, which has everything registered too

A kernel reads many small pieces at the rate of the link, where a copy per piece pays for each. What cannot be opened
(another host, another container without a shared process namespace) goes below, with the reason in the log. On the wire
it is the transport below, with handles beside what that one offers: peers that know nothing of them read from here.
"""

from __future__ import annotations

import itertools
import logging
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.errors import TransferError
from cluster.protos import worker_pb2 as pb
from kvtransfer import device_memory
from kvtransfer.address_tables import ALIGNMENT, common_length
from kvtransfer.device_memory import AddressMap, Opened
from kvtransfer.transport import (
    HOST,
    AgentOffer,
    Descriptors,
    Indices,
    MemorySpan,
    PreparedId,
    ReadId,
    ReadState,
    Transport,
)

if TYPE_CHECKING:
    from kvtransfer.gather import Gather

log = logging.getLogger(__name__)

IPC = "ipc"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_id() -> bytes:
    """Equal for the processes of one host. A handle opened on another one would mean somebody else's memory."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""
    return f"{boot}@{platform.node()}".encode()


@dataclass(slots=True)
class _Peer:
    opened: list[Opened] = field(default_factory=list)
    map: AddressMap | None = None  # None: nothing of it could be opened


@dataclass(slots=True)
class _List:
    """`addresses` and `lengths`: [N] of device memory, as this process sees it; None: only the transport below can.
    `length` is that of all rows, where they have one. `ways`: of a peer's, the one in use first."""

    peer: str | None
    below: PreparedId | None
    ways: tuple[str, ...]
    addresses: NDArray[np.uint64] | None
    lengths: NDArray[np.uint64]
    length: int | None


class IpcTransport:
    """Implements Transport for a worker on `device`. Owns `below`, which is a second way to what the kernel can read
    where ways are `measured`."""

    def __init__(self, below: Transport, device: torch.device, *, measured: bool) -> None:
        self._below = below
        self._device = device
        self._measured = measured
        self._gather: Gather | None = None  # from the first peer on whose memory could be opened
        self._spans: list[MemorySpan] = []
        self._peers: dict[str, _Peer] = {}
        self._lists: dict[PreparedId, _List] = {}
        self._reads: dict[ReadId, ReadId | torch.cuda.Event] = {}
        self._ids = itertools.count(1)
        self._closed = False

    @property
    def name(self) -> str:
        return self._below.name

    @property
    def agent(self) -> str:
        return self._below.agent

    def register(self, span: MemorySpan) -> None:
        self._below.register(span)
        if span.device != HOST:
            self._spans.append(span)

    def offer(self) -> AgentOffer:
        below = self._below.offer()
        exported = {
            each.address: each for each in (device_memory.export(span.address, self._device) for span in self._spans)
        }
        ipc = pb.IpcOffer(host=host_id())
        for each in exported.values():
            ipc.spans.add(address=each.address, num_bytes=each.num_bytes, handle=each.handle)
        return AgentOffer(below.agent, below.metadata, ipc)

    def connect(self, offer: AgentOffer) -> str:
        name = self._below.connect(offer)
        peer = self._peers.setdefault(name, _Peer())
        if peer.map is None and offer.ipc is not None and offer.ipc.spans:
            self._open(name, peer, offer.ipc)
        return name

    def _open(self, name: str, peer: _Peer, offer: pb.IpcOffer) -> None:
        if offer.host != host_id():
            log.info("%s is on another host: its blocks are read by %s", name, self._below.name)
            return
        try:
            for span in offer.spans:
                peer.opened.append(device_memory.opened(span.handle, span.address, span.num_bytes, self._device))
        except TransferError as error:
            log.warning("%s: %s; its blocks are read by %s", name, error, self._below.name)
            self._close(peer)
            return
        peer.map = AddressMap(peer.opened)
        if self._gather is None:
            from kvtransfer.gather import Gather

            self._gather = Gather(self._device)

    def _close(self, peer: _Peer) -> None:
        while peer.opened:
            device_memory.close(peer.opened.pop(), self._device)

    def prepare(self, peer: str | None, descriptors: Descriptors) -> PreparedId:
        lengths = np.ascontiguousarray(descriptors[:, 1])
        addresses = None
        on_device = bool(len(descriptors)) and int(descriptors[0, 2]) != HOST
        opened = self._peers[peer].map if peer is not None else None
        if on_device and _aligned(descriptors):
            if peer is None:
                addresses = np.ascontiguousarray(descriptors[:, 0])
            elif opened is not None:
                addresses = opened(np.ascontiguousarray(descriptors[:, 0]), lengths)
        ways = () if peer is None or addresses is None else (IPC,)
        below = None
        if not ways or self._measured:  # own memory, too, is read into from peers of both kinds
            below = self._below.prepare(peer, descriptors)
            ways += () if peer is None else self._below.ways(below)
        prepared = PreparedId(next(self._ids))
        self._lists[prepared] = _List(peer, below, ways, addresses, lengths, common_length(lengths))
        return prepared

    def discard(self, prepared: PreparedId) -> None:
        entry = self._lists.pop(prepared, None)
        if entry is not None and entry.below is not None:
            self._below.discard(entry.below)

    def ways(self, remote: PreparedId) -> tuple[str, ...]:
        return self._lists[remote].ways

    def choose(self, remote: PreparedId, way: str) -> None:
        entry = self._lists[remote]
        assert way in entry.ways
        entry.ways = (way, *(each for each in entry.ways if each != way))
        if way != IPC and entry.below is not None:
            self._below.choose(entry.below, way)

    def read(self, local: PreparedId, local_rows: Indices, remote: PreparedId, remote_rows: Indices) -> ReadId:
        here, there = self._lists[local], self._lists[remote]
        read = ReadId(next(self._ids))
        if there.ways[0] != IPC:
            assert here.below is not None and there.below is not None
            self._reads[read] = self._below.read(here.below, local_rows, there.below, remote_rows)
            return read
        assert self._gather is not None and there.addresses is not None
        if here.addresses is None:
            raise TransferError(f"rows of {there.peer} are multiples of {ALIGNMENT} bytes, the local ones are not")
        lengths = here.lengths[local_rows] if here.length is None else here.length
        self._reads[read] = self._gather(there.addresses[remote_rows], here.addresses[local_rows], lengths)
        return read

    def poll(self, read: ReadId) -> ReadState:
        entry = self._reads[read]
        if not isinstance(entry, torch.cuda.Event):
            return self._below.poll(entry)
        try:
            return ReadState.COMPLETE if entry.query() else ReadState.PENDING
        except RuntimeError as error:  # the device has failed: so will everything else on it
            raise TransferError(f"reading: {error}") from error

    def release(self, read: ReadId) -> None:
        """A kernel that runs cannot be called back; it ends as it would have."""
        entry = self._reads.pop(read, None)
        if entry is not None and not isinstance(entry, torch.cuda.Event):
            self._below.release(entry)

    def disconnect(self, peer: str) -> None:
        entry = self._peers.pop(peer, None)
        if entry is not None:
            if self._gather is not None:
                self._gather.wait()  # unmapping under a kernel would end the process
            for prepared in [key for key, each in self._lists.items() if each.peer == peer]:
                self.discard(prepared)
            self._close(entry)
        self._below.disconnect(peer)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for peer in list(self._peers):
            self.disconnect(peer)
        self._below.close()


def _aligned(descriptors: Descriptors) -> bool:
    return not (descriptors[:, :2] % ALIGNMENT).any()

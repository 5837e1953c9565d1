"""The byte mover that the executor needs. NIXL, CUDA IPC and the in-process double implement it.

Life of a transport, all on one thread (the bytes thread) except where a method says otherwise:

    register each region once -> offer -> connect(peer's offer) -> prepare both sides, for the whole pool
        -> choose one of several ways, by what each is seen to do
        -> per pull: read -> poll until COMPLETE -> release            -> disconnect -> close

Nothing here knows blocks, requests or generations. A transport reads whatever lies at a registered address and says
COMPLETE: whether the bytes are still the ones that were meant is for the executor to check.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, NewType, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.protos import worker_pb2 as pb

HOST = 0  # device code of host memory; CUDA device i has code i + 1

Descriptors = NDArray[np.uint64]  # [num_descriptors, 3]: address, bytes, device code; one device code per list
Indices = NDArray[np.int32]  # [num_reads]: rows of a prepared list

TransportKind = Literal["auto", "nixl", "ipc"]

PreparedId = NewType("PreparedId", int)
ReadId = NewType("ReadId", int)


@dataclass(frozen=True, slots=True)
class MemorySpan:
    """Registered memory. Whoever registers it keeps it mapped until `close` has returned and no peer reads it."""

    address: int
    num_bytes: int
    device: int = HOST


@dataclass(frozen=True, slots=True)
class AgentOffer:
    """What a peer needs to read from here; travels inside pb.RankOffer. `metadata` is opaque: from an
    authenticated peer only, since libraries parse it without care. `ipc` is for peers of the same host; who knows
    nothing of it reads all the same."""

    agent: str
    metadata: bytes
    ipc: pb.IpcOffer | None = None


class ReadState(Enum):
    PENDING = "pending"
    COMPLETE = "complete"


class Transport(Protocol):
    """Not thread-safe: one thread calls it, except `offer`. Errors are cluster.errors.TransferError and below."""

    @property
    def name(self) -> str:
        """ "nixl", "loopback": what two workers must have in common."""
        ...

    @property
    def agent(self) -> str:
        """Unique per incarnation and rank: a restarted process must come with another name."""
        ...

    def register(self, span: MemorySpan) -> None:
        """Makes memory readable by peers and writable by own reads. Before `offer` for what peers shall read."""
        ...

    def offer(self) -> AgentOffer:
        """What was registered so far, for peers. Any thread."""
        ...

    def connect(self, offer: AgentOffer) -> str:
        """Returns the peer's agent name. Blocks, up to ~100 ms the first time. Raises TransferError."""
        ...

    def prepare(self, peer: str | None, descriptors: Descriptors) -> PreparedId:
        """Descriptors of own memory (peer None) or of a connected peer's, checked against what is registered.

        Raises NotRegistered. The caller releases it with `discard`.
        """
        ...

    def discard(self, prepared: PreparedId) -> None:
        """Frees a prepared list that no read in flight uses. Idempotent."""
        ...

    def ways(self, remote: PreparedId) -> tuple[str, ...]:
        """What can move the rows of a peer's list: "nixl", "ipc", "loopback"; the one in use comes first. Of several,
        whoever prepared it measures each and chooses."""
        ...

    def choose(self, remote: PreparedId, way: str) -> None:
        """One of `ways`, for the reads from now on."""
        ...

    def read(self, local: PreparedId, local_rows: Indices, remote: PreparedId, remote_rows: Indices) -> ReadId:
        """Starts copying remote_rows[i] over local_rows[i], in no particular order; rows pair up in size.

        From here until `poll` says COMPLETE or raises, the local memory belongs to the transport. May block for the
        whole copy (CMA does), without the interpreter lock. Raises PeerLost or NotRegistered: then nothing is in
        flight. Neighbouring descriptors are merged: pass rows sorted by address.
        """
        ...

    def poll(self, read: ReadId) -> ReadState:
        """Never blocks. Raises PeerLost or another TransferError when the read has failed: nothing of it is in
        flight any more. A frozen peer may leave it PENDING for ever: deadlines are the caller's."""
        ...

    def release(self, read: ReadId) -> None:
        """Forgets a read. On one still PENDING this gives up the handle, not the memory. Idempotent."""
        ...

    def disconnect(self, peer: str) -> None:
        """Forgets a peer; lists prepared for it must not be used again. Idempotent, never raises for a dead peer."""
        ...

    def close(self) -> None:
        """Ends the agent. Reads in flight are given up. Idempotent."""
        ...

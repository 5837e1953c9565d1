"""NIXL behind the Transport protocol: UCX over shared memory, CMA, TCP, RDMA or NVLink. The only file that imports it.

What NIXL does not do, and this file makes up for:

* Without RDMA hardware, every process that made an agent would crash at exit (`prepare_environment`).
* The Python API fixes the progress thread's delay at 0, a core per idle agent (`_progress_delay`).
* Failures are exceptions without a common base, and never the state "ERR" (`_translated`).
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from logging import WARNING, getLogger
from pathlib import Path

import nixl._api as api
import numpy as np

from cluster.errors import NotRegistered, PeerLost, TransferError
from kvtransfer.transport import HOST, AgentOffer, Descriptors, Indices, MemorySpan, PreparedId, ReadId, ReadState

PROGRESS_DELAY_US = 1000
LOCAL = "NIXL_INIT_AGENT"

_bindings = import_module("nixl._bindings")  # of whichever CUDA version is installed
_ERRORS: tuple[type[Exception], ...] = tuple(
    value for name, value in vars(_bindings).items() if name.startswith("nixl") and name.endswith("Error")
)
_construction = threading.Lock()

getLogger("nixl").setLevel(WARNING)


def prepare_environment(ucx_tls: str = "auto", infiniband: Path = Path("/sys/class/infiniband")) -> None:
    """Settings that UCX reads from the environment. Call it at process entry, before the first agent.

    `ucx_tls` is the config's transfer.ucx_tls; "auto" leaves the choice to UCX. Raises ValueError for a list
    without tcp, which UCX needs to reach a peer at all.
    """
    if not infiniband.is_dir() or not any(infiniband.iterdir()):
        # UCX's ib module brings a libnl that crashes the process at exit.
        os.environ.setdefault("UCX_MODULES", "^ib")
    if ucx_tls != "auto":
        if not ucx_tls.startswith("^") and not {"tcp", "all"} & set(ucx_tls.split(",")):
            raise ValueError(f"transfer.ucx_tls: {ucx_tls!r} lacks tcp, which UCX needs to connect; add it")
        os.environ["UCX_TLS"] = ucx_tls


class _SlowProgress(_bindings.nixlAgentConfig):
    """The API assigns 0 to pthrDelay after making the object: here the assignment does not count."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, PROGRESS_DELAY_US if name == "pthrDelay" else value)


@contextmanager
def _progress_delay() -> Iterator[None]:
    with _construction:
        original = _bindings.nixlAgentConfig
        setattr(_bindings, "nixlAgentConfig", _SlowProgress)  # noqa: B010
        try:
            yield
        finally:
            setattr(_bindings, "nixlAgentConfig", original)  # noqa: B010


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except _bindings.nixlRemoteDisconnectError as error:
        raise PeerLost(f"{what}: {error}") from error
    except _bindings.nixlNotFoundError as error:
        raise NotRegistered(f"{what}: {error}") from error
    except _ERRORS as error:
        raise TransferError(f"{what}: {type(error).__name__}: {error}") from error


@dataclass(slots=True)
class _Prepared:
    peer: str | None
    handle: api.nixl_prepped_dlist_handle


@dataclass(slots=True)
class _Read:
    handle: api.nixl_xfer_handle
    complete: bool


class NixlTransport:
    """Implements Transport with one UCX agent. `read` blocks for the whole copy where UCX copies by CMA."""

    def __init__(self, agent: str) -> None:
        """`agent` must be new for every incarnation. Raises TransferError when there is no UCX."""
        config = api.nixl_agent_config(
            enable_prog_thread=True, sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        with _translated(f"agent {agent}"), _progress_delay():
            self._api = api.nixl_agent(agent, config)
        if "UCX" not in self._api.backends:
            raise TransferError(f"agent {agent}: NIXL found no UCX, only {self._api.get_plugin_list()}")
        self._agent = agent
        self._closed = False
        self._registered: list[object] = []
        self._prepared: dict[PreparedId, _Prepared] = {}
        self._reads: dict[ReadId, _Read] = {}
        self._peers: set[str] = set()
        self._ids = itertools.count(1)

    @property
    def name(self) -> str:
        return "nixl"

    @property
    def agent(self) -> str:
        return self._agent

    def register(self, span: MemorySpan) -> None:
        kind, device = _memory(span.device)
        with _translated(f"registering {span}"):
            self._registered.append(self._api.register_memory([(span.address, span.num_bytes, device, "")], kind))

    def offer(self) -> AgentOffer:
        with _translated("metadata"):
            return AgentOffer(self._agent, self._api.get_agent_metadata())

    def connect(self, offer: AgentOffer) -> str:
        with _translated(f"connecting to {offer.agent}"):
            name = self._api.add_remote_agent(offer.metadata)
        peer = name.decode() if isinstance(name, bytes) else name
        if peer != offer.agent:
            self._api.remove_remote_agent(peer)
            raise TransferError(f"agent {offer.agent!r} sent the metadata of {peer!r}")
        self._peers.add(peer)
        return peer

    def prepare(self, peer: str | None, descriptors: Descriptors) -> PreparedId:
        codes = np.unique(descriptors[:, 2])
        assert len(codes) == 1, f"one device per list, not {codes}"
        kind, device = _memory(int(codes[0]))
        rows = np.ascontiguousarray(descriptors)
        if device != codes[0]:
            rows = rows.copy()
            rows[:, 2] = device
        with _translated(f"preparing {len(rows)} descriptors of {peer or self._agent}"):
            handle = self._api.prep_xfer_dlist(peer or LOCAL, rows, kind)
        prepared = PreparedId(next(self._ids))
        self._prepared[prepared] = _Prepared(peer, handle)
        return prepared

    def discard(self, prepared: PreparedId) -> None:
        entry = self._prepared.pop(prepared, None)
        if entry is not None:
            with _translated("discarding descriptors"):
                entry.handle.release()

    def ways(self, remote: PreparedId) -> tuple[str, ...]:
        return (self.name,)

    def choose(self, remote: PreparedId, way: str) -> None:
        assert way == self.name

    def read(self, local: PreparedId, local_rows: Indices, remote: PreparedId, remote_rows: Indices) -> ReadId:
        here, there = self._prepared[local], self._prepared[remote]
        with _translated(f"reading from {there.peer}"):
            handle = self._api.make_prepped_xfer("READ", here.handle, local_rows, there.handle, remote_rows)
            try:
                state = self._api.transfer(handle)
            except _ERRORS:
                self._let_go(handle)
                raise
        read = ReadId(next(self._ids))
        self._reads[read] = _Read(handle, self._completed(state, f"reading from {there.peer}"))
        return read

    def poll(self, read: ReadId) -> ReadState:
        entry = self._reads[read]
        if not entry.complete:
            with _translated("reading"):
                state = self._api.check_xfer_state(entry.handle)
            entry.complete = self._completed(state, "reading")
        return ReadState.COMPLETE if entry.complete else ReadState.PENDING

    def release(self, read: ReadId) -> None:
        entry = self._reads.pop(read, None)
        if entry is not None:
            self._let_go(entry.handle)

    def disconnect(self, peer: str) -> None:
        if peer in self._peers:
            self._peers.discard(peer)
            for prepared in [key for key, entry in self._prepared.items() if entry.peer == peer]:
                self.discard(prepared)
            try:
                self._api.remove_remote_agent(peer)
            except _ERRORS:
                getLogger(__name__).debug("peer %s was gone already", peer, exc_info=True)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for read in list(self._reads):
            self.release(read)
        for peer in list(self._peers):
            self.disconnect(peer)
        for prepared in list(self._prepared):
            self.discard(prepared)
        for registration in self._registered:
            with _translated("deregistering"):
                self._api.deregister_memory(registration)
        self._registered.clear()
        del self._api

    def _completed(self, state: str, what: str) -> bool:
        if state == "ERR":
            raise TransferError(f"{what}: failed")
        return state == "DONE"

    def _let_go(self, handle: api.nixl_xfer_handle) -> None:
        """Releasing an active or failed transfer aborts it, and may say so by an exception: not our news."""
        try:
            handle.release()
        except _ERRORS:
            getLogger(__name__).debug("transfer handle was not idle", exc_info=True)


def _memory(code: int) -> tuple[str, int]:
    """Device code -> NIXL's memory kind and device number."""
    return ("DRAM", 0) if code == HOST else ("VRAM", code - 1)

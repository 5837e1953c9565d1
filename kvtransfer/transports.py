"""Which transport moves the blocks of a worker."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch

from cluster.errors import ConfigError, TransferError
from kvtransfer import device_memory
from kvtransfer.ipc_transport import IpcTransport
from kvtransfer.nixl_transport import NixlTransport
from kvtransfer.transport import Transport, TransportKind

log = logging.getLogger(__name__)

LIBRARIES = ("cuda.bindings.driver", "triton")  # that CUDA IPC and the kernel need


@dataclass(frozen=True, slots=True)
class TransportChoice:
    """`with_ipc`: CUDA IPC between GPUs of one host; everything else, or everything, goes by NIXL."""

    with_ipc: bool
    reason: str

    def __str__(self) -> str:
        return f"{'ipc on one host, else nixl' if self.with_ipc else 'nixl'}: {self.reason}"


def choose_transport(
    wanted: TransportKind, device: torch.device, libraries: Sequence[str] = LIBRARIES
) -> TransportChoice:
    """For a worker that computes on `device`. Raises ConfigError for "ipc" where that is not possible."""
    if wanted == "nixl":
        return TransportChoice(False, "transfer.transport is nixl")
    obstacle = _obstacle(device, libraries)
    if obstacle is None:
        return TransportChoice(True, f"memory of {device} can be exported")
    if wanted == "ipc":
        raise ConfigError("transfer.transport", f"ipc, but {obstacle}; or set transfer.transport=auto")
    return TransportChoice(False, obstacle)


def open_transport(kind: TransportKind, agent: str, device: torch.device) -> Transport:
    """`agent` must be new for every incarnation. Raises ConfigError as `choose_transport`, TransferError when there is
    no UCX."""
    choice = choose_transport(kind, device)
    if choice.with_ipc:
        return IpcTransport(NixlTransport(agent), device, measured=kind == "auto")
    if kind == "auto" and device.type == "cuda":
        log.warning("GPUs of one host are read by NIXL, too: %s", choice.reason)
    return NixlTransport(agent)


def _obstacle(device: torch.device, libraries: Sequence[str]) -> str | None:
    """Why no kernel of another process can read memory of `device`, and what to do about it."""
    if device.type != "cuda":
        return f"this worker's blocks lie in memory of {device}, not of a GPU"
    for library in libraries:
        try:
            import_module(library)
        except ImportError as error:
            return f"{library} cannot be imported ({error}): install sluice[gpu]"
    try:
        device_memory.export(torch.empty(1, device=device).data_ptr(), device)
    except TransferError as error:
        return f"{error}: leave expandable_segments out of PYTORCH_CUDA_ALLOC_CONF"
    return None

"""Which transport moves the blocks of a worker."""

from __future__ import annotations

import torch

from cluster.errors import ConfigError
from kvtransfer.nixl_transport import NixlTransport
from kvtransfer.transport import Transport, TransportKind


def open_transport(kind: TransportKind, agent: str, device: torch.device) -> Transport:
    """`agent` must be new for every incarnation. Raises ConfigError for "ipc" without a GPU, TransferError when there
    is no UCX."""
    if kind != "ipc":
        return NixlTransport(agent)
    if device.type != "cuda":
        raise ConfigError(
            "transfer.transport", f"ipc moves blocks between GPUs, this worker runs on {device}; set nixl"
        )
    from kvtransfer.ipc_transport import IpcTransport

    return IpcTransport(NixlTransport(agent), device)

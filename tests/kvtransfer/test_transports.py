"""Which transport a worker takes, and why. What `ipc` does on GPUs: tests/gpu/test_ipc.py."""

from __future__ import annotations

import pytest
import torch

from cluster.errors import ConfigError
from kvtransfer.transport import TransportKind
from kvtransfer.transports import choose_transport, open_transport

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("wanted", "device", "reason"),
    [
        ("nixl", GPU, "transfer.transport is nixl"),
        ("auto", CPU, "memory of cpu"),
        ("auto", GPU, "no_such_library cannot be imported"),
    ],
)
def test_nixl_alone_and_why(wanted: TransportKind, device: torch.device, reason: str) -> None:
    choice = choose_transport(wanted, device, ["json", "no_such_library"])
    assert not choice.with_ipc and reason in choice.reason
    assert str(choice).startswith("nixl: ")


def test_what_is_missing_comes_with_the_remedy() -> None:
    assert choose_transport("auto", GPU, ["no_such_library"]).reason.endswith("install sluice[gpu]")


@pytest.mark.parametrize(
    ("device", "why"), [(CPU, "ipc, but this worker's blocks lie in memory of cpu"), (GPU, "ipc, but no_such_library")]
)
def test_ipc_where_it_cannot_be_is_an_error_with_the_remedy(device: torch.device, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"transfer\.transport: {why}.*; or set transfer\.transport=auto"):
        choose_transport("ipc", device, ["no_such_library"])


def test_a_worker_that_asks_for_it_without_a_gpu_does_not_start() -> None:
    with pytest.raises(ConfigError, match="memory of cpu"):
        open_transport("ipc", "worker-0", CPU)

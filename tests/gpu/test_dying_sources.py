"""GPU workers killed or frozen while others read from them, over CUDA IPC and over NIXL. 50 deaths in the long form."""

from __future__ import annotations

import signal

import pytest
import torch

from kvtransfer.connector import Outcome
from kvtransfer.transport import TransportKind
from tests.support.dying_sources import outcomes_of_deaths
from tests.support.kv_builders import latent_geometry

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

GEOMETRY = latent_geometry(num_layers=61, block_size=64, row_size=576)  # 4.5 MB and 2.3 MB a block


@pytest.mark.parametrize("devices", [("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")], ids=["one", "two"])
@pytest.mark.parametrize("transport", ["ipc", "nixl"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_sink_and_its_device_go_on(
    number: signal.Signals, transport: TransportKind, devices: tuple[str, str], request: pytest.FixtureRequest
) -> None:
    if devices[1] == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    num_deaths = (50 if request.config.getoption("full") else 4) if number is signal.SIGKILL else 3
    outcomes = outcomes_of_deaths(number, num_deaths, GEOMETRY, transport=transport, devices=devices)
    print(f"{transport}, {number.name}, {num_deaths} times: {dict(outcomes)}")
    if number is signal.SIGKILL:
        assert outcomes[Outcome.LOST], "no source died under a read"
        assert transport == "nixl" or not outcomes[Outcome.STUCK]

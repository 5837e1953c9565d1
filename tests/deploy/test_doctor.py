"""What the doctor says of the bytes plane. On GPUs it measures them, too; that needs a machine with some."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import checkpoint
from cluster.config import TransferConfig
from deploy.__main__ import main
from deploy.transfer_probe import measure


@pytest.mark.parametrize(
    ("transport", "said", "rc"),
    [
        ("auto", "transport nixl: this worker's blocks lie in memory of cpu", 0),
        ("nixl", "transport nixl: transfer.transport is nixl", 0),
        ("ipc", "transfer.transport: ipc, but this worker's blocks lie in memory of cpu", 1),
    ],
)
def test_what_moves_blocks_and_why(
    transport: str, said: str, rc: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint.write(tmp_path, checkpoint.TINY)
    settings = ("engine.device=cpu", f"transfer.transport={transport}")
    overrides = [word for each in settings for word in ("--set", each)]
    assert main(["doctor", "--model", str(folder), "--load-format", "dummy", "--no-transfer", *overrides]) == rc
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.full
def test_the_rate_between_two_processes_is_measured() -> None:
    rate = measure(TransferConfig())
    assert (rate.transport, rate.others) == ("nixl", {})
    assert rate.num_bytes > 70e6 and rate.bytes_per_s > 0 and rate.memcpy_bytes_per_s > 0

"""Where a process computes and with what it may: auto, asked for, forbidden."""

from __future__ import annotations

import pytest
import torch

from cluster.errors import ConfigError
from workers.attention.environment import Environment, choose_device
from workers.attention.interface import AttentionProblem
from workers.attention.resolver import HOPPER, resolve

LLAMA = AttentionProblem(
    kind="gqa", num_heads=8, num_kv_heads=2, head_dim=128, block_size=64, dtype=torch.bfloat16, scale=0.1
)
H200 = Environment(
    "cuda",
    (9, 0),
    "NVIDIA H200",
    132,
    (("flashinfer", "0.7.2"), ("triton", "3.6.0")),
    cuda="13.0",
    free_bytes=140_000_000_000,
    total_bytes=150_000_000_000,
)


def test_the_cpu_may_be_asked_for_anywhere() -> None:
    assert choose_device("cpu", num_gpus=0, strict=True).device == torch.device("cpu")


def test_without_a_gpu_auto_says_why_and_everything_else_is_an_error() -> None:
    choice = choose_device("auto")
    if choice.device.type == "cuda":
        assert "is visible" in choice.reason
        return
    assert "without CUDA: install" in choice.reason or "look at CUDA_VISIBLE_DEVICES" in choice.reason
    with pytest.raises(ConfigError, match=r"^engine\.device: cuda, but .*; or set engine\.device=auto"):
        choose_device("cuda")
    with pytest.raises(
        ConfigError, match=r"^engine\.strict: the pool has gpus: 0\.5, but .*; or set engine\.strict=false"
    ):
        choose_device("auto", num_gpus=0.5, strict=True)
    assert choose_device("auto", num_gpus=0.5).device.type == "cpu"


@pytest.mark.parametrize(
    ("switch", "reason"), [(HOPPER, "is switched off"), ("flashinfer", "flashinfer is switched off")]
)
def test_backends_and_libraries_have_switches(switch: str, reason: str) -> None:
    assert resolve(LLAMA, H200).replays
    off = Environment("cuda", (9, 0), "NVIDIA H200", 132, H200.libraries, frozenset({switch}))
    choice = resolve(LLAMA, off)
    assert choice.chosen == "reference" and not choice.replays
    assert dict(choice.rejected)[HOPPER] == reason
    strict = Environment("cuda", (9, 0), "NVIDIA H200", 132, H200.libraries, frozenset({switch}), strict=True)
    with pytest.raises(ConfigError, match=rf"^engine\.strict: .*{reason}.*; set engine\.strict=false"):
        resolve(LLAMA, strict)


def test_an_environment_says_what_it_is() -> None:
    assert str(H200) == (
        "NVIDIA H200, SM90; 132 multiprocessors, CUDA 13.0; 140.0 of 150.0 GB free; flashinfer 0.7.2; triton 3.6.0"
    )
    assert str(Environment("cpu", disabled=frozenset({"triton"}), strict=True)) == "cpu; switched off: triton; strict"

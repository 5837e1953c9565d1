"""The section of the config that says where and with what a worker computes."""

from __future__ import annotations

from typing import Literal

from cluster.section import Section

Device = Literal["auto", "cpu", "cuda"]
Switch = Literal["deep_gemm", "flashinfer", "hopper", "triton", "trtllm-gen"]


class EngineConfig(Section):
    device: Device = "auto"
    """auto: the GPU that a worker sees, if it is one that our kernels are written for (Hopper), else the CPU; cuda: a
    GPU, and a worker that sees none does not start; pools then ask Ray for one GPU per worker unless they say
    otherwise."""
    strict: bool = False
    """A worker does not start with a slower backend than the fastest that there is for its model, or on the CPU where
    its pool has GPUs."""
    disabled: tuple[Switch, ...] = ()
    """Backends (hopper, trtllm-gen) and kernel libraries (deep_gemm, flashinfer, triton) that must not be used."""
    overlap: bool | None = None
    """Prepare the next step while one runs; none: on a GPU."""
    cuda_graphs: bool = True
    """Replay decode steps as CUDA graphs, where the backend can."""

"""What a process may use: probed once, at start, and handed on."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

import torch

from cluster.errors import ConfigError

FAST = (9, 0)  # the compute capability that our kernels are written for
_PACKAGES = {"flashinfer": "flashinfer-python", "triton": "triton", "deep_gemm": "sgl-deep-gemm"}  # by import name


@dataclass(frozen=True, slots=True)
class Environment:
    """`disabled` names libraries and backends that were switched off; with `strict` a degradation is an error."""

    device_type: str
    capability: tuple[int, int] | None = None  # of the GPU, (9, 0) for Hopper
    device_name: str = ""
    num_multiprocessors: int = 0
    libraries: tuple[tuple[str, str], ...] = ()  # import name, version
    disabled: frozenset[str] = frozenset()
    strict: bool = False
    cuda: str = ""  # version that torch was built for
    free_bytes: int = 0  # of the GPU's memory, when it was looked at
    total_bytes: int = 0

    @classmethod
    def probe(cls, device: torch.device, *, disabled: Collection[str] = (), strict: bool = False) -> Environment:
        found = tuple((name, _version(package)) for name, package in _PACKAGES.items() if find_spec(name) is not None)
        if device.type != "cuda":
            return cls(device.type, libraries=found, disabled=frozenset(disabled), strict=strict)
        if "flashinfer" in dict(found) and _topk_is_built():
            found += (("flashinfer_topk", dict(found)["flashinfer"]),)
        properties = torch.cuda.get_device_properties(device)
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return cls(
            device.type,
            (properties.major, properties.minor),
            properties.name,
            properties.multi_processor_count,
            found,
            frozenset(disabled),
            strict,
            torch.version.cuda or "",
            free_bytes,
            total_bytes,
        )

    def __str__(self) -> str:
        parts = [self.device_type]
        if self.capability is not None:
            parts = [
                f"{self.device_name}, SM{self.capability[0]}{self.capability[1]}",
                f"{self.num_multiprocessors} multiprocessors, CUDA {self.cuda}",
                f"{self.free_bytes / 1e9:.1f} of {self.total_bytes / 1e9:.1f} GB free",
            ]
        parts += [f"{name} {number}" for name, number in self.libraries]
        if self.disabled:
            parts.append(f"switched off: {', '.join(sorted(self.disabled))}")
        return "; ".join([*parts, *(["strict"] if self.strict else [])])

    def lacks(self, library: str) -> str | None:
        """Why a library cannot be used, if it cannot."""
        if library in self.disabled:
            return f"{library} is switched off"
        if library not in dict(self.libraries):
            return f"{library} is not installed"
        return None


def _topk_is_built() -> bool:
    """Whether FlashInfer would load its top-k module; else it would build it, for half an hour."""
    from flashinfer.jit.topk import gen_topk_module

    return gen_topk_module().get_library_path().exists()


class DeviceChoice(NamedTuple):
    device: torch.device
    reason: str


def choose_device(wanted: str, *, num_gpus: float = 0.0, strict: bool = False) -> DeviceChoice:
    """Where a process computes. `wanted`: auto, cpu or cuda, see the config; `num_gpus`: what its pool asked for.

    Of several visible GPUs the current one, as every worker gets its own to see. Raises ConfigError: a GPU is wanted
    and there is none, or strict and the pool has GPUs that nothing would compute on.
    """
    if wanted == "cpu":
        return DeviceChoice(torch.device("cpu"), "engine.device is cpu")
    missing = _no_gpu()
    if missing is None:
        device = torch.device("cuda", torch.cuda.current_device())
        capability = torch.cuda.get_device_capability(device)
        card = f"{torch.cuda.get_device_name(device)}, SM{capability[0]}{capability[1]}"
        if wanted == "cuda" or capability == FAST:
            return DeviceChoice(device, f"{card} is visible")
        missing = f"the kernels are for SM{FAST[0]}{FAST[1]}, not for {card}"
    if wanted == "cuda":
        raise ConfigError("engine.device", f"cuda, but {missing}; or set engine.device=auto")
    if strict and num_gpus:
        raise ConfigError(
            "engine.strict",
            f"the pool has gpus: {num_gpus:g}, but {missing}; or set engine.strict=false to compute on the CPU",
        )
    return DeviceChoice(torch.device("cpu"), missing)


def _no_gpu() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a build with it"
    if not torch.cuda.is_available():
        return "no GPU is visible to this process: give its pool gpus, and look at CUDA_VISIBLE_DEVICES"
    return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"

"""What a process may use: probed once, at start, and handed on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

_PACKAGES = {"flashinfer": "flashinfer-python", "triton": "triton", "deep_gemm": "sgl-deep-gemm"}  # by import name


@dataclass(frozen=True, slots=True)
class Environment:
    """`disabled` names libraries that the operator switched off; with `strict` a degradation is an error."""

    device_type: str
    capability: tuple[int, int] | None = None  # of the GPU, (9, 0) for Hopper
    device_name: str = ""
    num_multiprocessors: int = 0
    libraries: tuple[tuple[str, str], ...] = ()  # import name, version
    disabled: frozenset[str] = frozenset()
    strict: bool = False

    @classmethod
    def probe(cls, device: torch.device, *, disabled: Collection[str] = (), strict: bool = False) -> Environment:
        found = tuple((name, _version(package)) for name, package in _PACKAGES.items() if find_spec(name) is not None)
        if device.type != "cuda":
            return cls(device.type, libraries=found, disabled=frozenset(disabled), strict=strict)
        properties = torch.cuda.get_device_properties(device)
        return cls(
            device.type,
            (properties.major, properties.minor),
            properties.name,
            properties.multi_processor_count,
            found,
            frozenset(disabled),
            strict,
        )

    def lacks(self, library: str) -> str | None:
        """Why a library cannot be used, if it cannot."""
        if library in self.disabled:
            return f"{library} is switched off"
        if library not in dict(self.libraries):
            return f"{library} is not installed"
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"

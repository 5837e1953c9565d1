"""Device memory that another process of this host may open: CUDA IPC through the driver's own bindings."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.errors import NotRegistered, TransferError


class Exported(NamedTuple):
    """One allocation of the driver, which is what a handle stands for."""

    address: int
    num_bytes: int
    handle: bytes


class Opened(NamedTuple):
    """Another process's allocation: `theirs` there, `here` in this one."""

    theirs: int
    here: int
    num_bytes: int


class AddressMap:
    """Where ranges of another process's addresses are in this one."""

    def __init__(self, ranges: Sequence[Opened]) -> None:
        ordered = sorted(ranges, key=lambda each: each.theirs)
        self._theirs = np.array([each.theirs for each in ordered], np.uint64)
        self._ends = np.array([each.theirs + each.num_bytes for each in ordered], np.uint64)
        self._here = np.array([each.here for each in ordered], np.uint64)

    def __call__(self, addresses: NDArray[np.uint64], lengths: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """[N] -> [N]. Raises NotRegistered for a row outside all ranges."""
        index = np.searchsorted(self._theirs, addresses, side="right").astype(np.int64) - 1
        outside = (index < 0) | (addresses + lengths > self._ends[np.maximum(index, 0)])
        if outside.any():
            row = int(np.argmax(outside))
            raise NotRegistered(
                f"{int(lengths[row])} bytes at {int(addresses[row]):#x} are in no range that was offered"
            )
        return self._here[index] + (addresses - self._theirs[index])


def export(address: int, device: torch.device) -> Exported:
    """The allocation that `address` lies in. Raises TransferError where the allocator made memory that has no handle
    (PYTORCH_CUDA_ALLOC_CONF=expandable_segments)."""
    from cuda.bindings import driver

    with _context(device):
        base, num_bytes = _checked(driver.cuMemGetAddressRange(address), "looking an allocation up")
        (handle,) = _checked(driver.cuIpcGetMemHandle(base), "exporting device memory")
    return Exported(int(base), int(num_bytes), bytes(handle.reserved))


def opened(handle: bytes, theirs: int, num_bytes: int, device: torch.device) -> Opened:
    """Opened on the device that reads: opened on the owner's, kernels of this one may not touch it. Raises
    TransferError."""
    from cuda.bindings import driver

    wanted = driver.CUipcMemHandle()
    wanted.reserved = handle
    flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    with _context(device):
        (here,) = _checked(driver.cuIpcOpenMemHandle(wanted, flags), "opening a peer's device memory")
    return Opened(theirs, int(here), num_bytes)


def close(memory: Opened, device: torch.device) -> None:
    """No kernel may be reading it. Raises TransferError."""
    from cuda.bindings import driver

    with _context(device):
        _checked(driver.cuIpcCloseMemHandle(memory.here), "closing a peer's device memory")


@contextmanager
def _context(device: torch.device) -> Iterator[None]:
    """The device's context is the calling thread's: the driver's own calls ask for one, where those of the runtime,
    torch's too, make it so."""
    from cuda.bindings import driver

    number = torch.cuda.current_device() if device.index is None else device.index
    (ordinal,) = _checked(driver.cuDeviceGet(number), "looking a device up")
    (context,) = _checked(driver.cuDevicePrimaryCtxRetain(ordinal), "retaining a device's context")
    try:
        _checked(driver.cuCtxPushCurrent(context), "entering a device's context")
        try:
            yield
        finally:
            _checked(driver.cuCtxPopCurrent(), "leaving a device's context")
    finally:
        _checked(driver.cuDevicePrimaryCtxRelease(ordinal), "releasing a device's context")


def _checked(answer: tuple, what: str) -> tuple:
    from cuda.bindings import driver

    status, *values = answer
    if status != driver.CUresult.CUDA_SUCCESS:
        raise TransferError(f"{what}: {status.name}")
    return tuple(values)

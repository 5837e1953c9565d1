"""Products of bf16 matrices by one kernel of cuBLASLt, chosen by its numbers, through its C interface. Reference:
torch.nn.functional.linear, for which cuBLAS chooses by rules.

Kernels that split the depth are left aside: they were not faster. Products of one device share a workspace: they run
one after the other, on one stream. Shapes: T rows, n outputs, m inputs.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint16, c_uint32, c_uint64
from ctypes import c_void_p as Pointer
from functools import cache

import torch
from torch import Tensor

from workers.kernels.tactics import LtKernel

# Of library_types.h, cublas_api.h and cublasLt.h, CUDA 12 and 13.
_BF16, _FP32, _COMPUTE_FP32 = 14, 0, 68
_TRANSPOSE_FIRST, _TRANSPOSED = 3, 1
_COLUMNS = 3  # attribute of a layout
_CHECKED_ROWS = 128
_ALTERNATIVES = 64
_WORKSPACE = 32 << 20  # bytes, as torch gives to cuBLAS
_MOST_WORKSPACE = 1  # attribute of a preference
# Attributes of a kernel, by the fields of LtKernel behind the algorithm.
_FIELDS = (("tile", 1, c_uint32), ("swizzle", 4, c_uint32), ("custom", 5, c_uint32), ("stages", 6, c_uint32))
_FIELDS += (("inner", 7, c_uint16), ("cluster", 8, c_uint16))
_ALGORITHM, _SPLITS = 0, 2


class LtError(RuntimeError):
    """cuBLASLt is not there, or has no such kernel."""


class _Algorithm(Structure):
    _fields_ = (("data", c_uint64 * 8),)


class _Found(Structure):
    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace", c_size_t),
        ("state", c_int32),
        ("waves", c_float),
        ("reserved", c_int32 * 4),
    )


def _functions() -> ctypes.CDLL:
    """Those that torch computes with: it has loaded them already."""
    major = (torch.version.cuda or "").split(".")[0]
    try:
        return ctypes.CDLL(f"libcublasLt.so.{major}")
    except OSError as error:
        raise LtError(f"cuBLASLt is not there: {error}") from error


def version() -> str:
    """To which the numbers of kernels belong. Raises LtError."""
    get_version = _functions().cublasLtGetVersion
    get_version.restype = c_size_t
    return str(get_version())


class _Library:
    """Of one device."""

    def __init__(self) -> None:
        self._functions = _functions()
        self.handle = Pointer()
        self.call("Create", byref(self.handle))
        self.workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device="cuda")

    def call(self, name: str, *arguments: object) -> None:
        """Raises LtError with the status."""
        status = getattr(self._functions, f"cublasLt{name}")(*arguments)
        if status:
            raise LtError(f"cublasLt{name} returned {status} (cublasStatus_t)")


@cache
def _library(device: int) -> _Library:
    with torch.cuda.device(device):
        return _Library()


class LtProduct:
    """x [T, m] of any row stride, weight [n, m] contiguous -> [T, n]. For cuBLAS, whose columns are contiguous, it is
    the transposed weight times x: n by T."""

    def __init__(self, device: int, weight: tuple[int, int], row_stride: int) -> None:
        self._library = _library(device)
        outputs, inputs = weight
        self._product = Pointer()
        self._call("MatmulDescCreate", byref(self._product), _COMPUTE_FP32, _FP32)
        self._call("MatmulDescSetAttribute", self._product, _TRANSPOSE_FIRST, byref(c_int(_TRANSPOSED)), c_size_t(4))
        self._weight = self._layout(inputs, outputs, inputs)
        self._rows = self._layout(inputs, _CHECKED_ROWS, row_stride)
        self._out = self._layout(outputs, _CHECKED_ROWS, outputs)
        self._outputs = outputs
        self._num_rows = _CHECKED_ROWS
        self._one, self._zero = c_float(1), c_float(0)
        self._algorithm = _Algorithm()

    def _call(self, name: str, *arguments: object) -> None:
        self._library.call(name, *arguments)

    def _layout(self, rows: int, columns: int, stride: int) -> Pointer:
        layout = Pointer()
        self._call("MatrixLayoutCreate", byref(layout), _BF16, c_uint64(rows), c_uint64(columns), c_int64(stride))
        return layout

    def choose(self, kernel: LtKernel) -> None:
        """Raises LtError where this version has no such kernel for this shape."""
        types = (_COMPUTE_FP32, _FP32, _BF16, _BF16, _BF16, _BF16)
        self._call("MatmulAlgoInit", self._library.handle, *types, kernel.algorithm, byref(self._algorithm))
        for field, attribute, kind in _FIELDS:
            value = kind(getattr(kernel, field))
            size = c_size_t(ctypes.sizeof(kind))
            self._call("MatmulAlgoConfigSetAttribute", byref(self._algorithm), attribute, byref(value), size)
        found = _Found()
        self._call("MatmulAlgoCheck", *self._problem(), byref(self._algorithm), byref(found))
        if found.workspace > _WORKSPACE:
            raise LtError(f"{kernel} wants a workspace of {found.workspace} bytes, there are {_WORKSPACE}")

    def _problem(self) -> tuple[Pointer, ...]:
        return self._library.handle, self._product, self._weight, self._rows, self._out, self._out

    def __call__(self, x: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
        rows = x.shape[0]
        out = torch.empty(rows, self._outputs, dtype=x.dtype, device=x.device) if total is None else total
        self._resize(rows)
        address = Pointer(out.data_ptr())
        self._call(
            "Matmul",
            self._library.handle,
            self._product,
            byref(self._one),
            *(Pointer(weight.data_ptr()), self._weight),
            *(Pointer(x.data_ptr()), self._rows),
            byref(self._zero if total is None else self._one),
            *(address, self._out, address, self._out),
            byref(self._algorithm),
            *(Pointer(self._library.workspace.data_ptr()), c_size_t(_WORKSPACE)),
            Pointer(torch.cuda.current_stream(x.device).cuda_stream),
        )
        return out

    def _resize(self, rows: int) -> None:
        if rows == self._num_rows:
            return
        for layout in (self._rows, self._out):
            self._call("MatrixLayoutSetAttribute", layout, _COLUMNS, byref(c_uint64(rows)), c_size_t(8))
        self._num_rows = rows

    def alternatives(self, rows: int) -> list[LtKernel]:
        """What cuBLASLt would try itself, with a workspace and without, but those that split the depth."""
        self._resize(rows)
        return list(dict.fromkeys([*self._proposed(_WORKSPACE), *self._proposed(0)]))

    def _proposed(self, workspace: int) -> list[LtKernel]:
        preference, count = Pointer(), c_int()
        self._call("MatmulPreferenceCreate", byref(preference))
        most = byref(c_size_t(workspace))
        self._call("MatmulPreferenceSetAttribute", preference, _MOST_WORKSPACE, most, c_size_t(8))
        found = (_Found * _ALTERNATIVES)()
        self._call("MatmulAlgoGetHeuristic", *self._problem(), preference, _ALTERNATIVES, byref(found), byref(count))
        self._call("MatmulPreferenceDestroy", preference)
        kernels = [_kernel_of(self._library, each.algorithm) for each in found[: count.value] if each.state == 0]
        return [kernel for kernel in kernels if kernel is not None]


def _kernel_of(library: _Library, algorithm: _Algorithm) -> LtKernel | None:
    def value(attribute: int, kind: type[c_uint32] | type[c_uint16]) -> int:
        held, written = kind(), c_size_t()
        size = c_size_t(ctypes.sizeof(kind))
        library.call("MatmulAlgoConfigGetAttribute", byref(algorithm), attribute, byref(held), size, byref(written))
        return held.value

    if value(_SPLITS, c_uint32) > 1:
        return None
    return LtKernel(value(_ALGORITHM, c_uint32), *(value(attribute, kind) for _, attribute, kind in _FIELDS))


@cache  # for each matrix of a model and kernel that a table names
def _chosen(device: int, weight: tuple[int, int], row_stride: int, kernel: LtKernel) -> LtProduct:
    product = LtProduct(device, weight, row_stride)
    product.choose(kernel)
    return product


def lt_linear(x: Tensor, weight: Tensor, kernel: LtKernel, total: Tensor | None = None) -> Tensor:
    """x [T, m], features contiguous, weight [n, m] contiguous, both bf16 -> [T, n]; with `total` [T, n], contiguous, it
    is added there. Raises LtError."""
    outputs, inputs = weight.shape
    return _chosen(x.device.index, (outputs, inputs), x.stride(0), kernel)(x, weight, total)

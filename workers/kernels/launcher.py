"""Launches of a Triton kernel that was looked up before.

Triton looks up what it compiled by the kinds of all arguments, at every launch: that takes a processor longer than many
a kernel takes the device, and steps of many small kernels wait for it.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor
from triton import JITFunction
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

_F = TypeVar("_F")


def power_of_two(least: int) -> int:
    """The next one from `least`, 1 or more, on. As triton.next_power_of_2, which takes a host 2 µs."""
    return 1 << (least - 1).bit_length()


class Launcher(Generic[_F]):
    """Of one kernel, whose constants are its last parameters. Triton's launch hooks hear of first launches alone."""

    def __init__(self, kernel: JITFunction[_F]) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Hashable, ...], CompiledKernel | None] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: tuple[Tensor | TensorDescriptor | float, ...],
        constants: Mapping[str, Hashable],
        *,
        num_warps: int,
        num_stages: int = 3,
    ) -> None:
        """`constants` in the order of the kernel's parameters."""
        # Whatever Triton may compile apart: dtypes, addresses and numbers that are multiples of 16, ones, wide numbers.
        kinds: list[Hashable] = []
        # Addresses instead of tensors: the driver is not asked again where each lies.
        passed: list[TensorDescriptor | float] = []
        for argument in arguments:
            if type(argument) is int:
                wide = (argument + (1 << 31)) >> 32  # 0: it has 32 bits
                kinds.append("one" if argument == 1 else (argument % 16 == 0, wide) if wide else argument % 16 == 0)
                passed.append(argument)
            elif isinstance(argument, Tensor):
                address = argument.data_ptr()
                kinds.append((argument.dtype, "odd") if address % 16 else argument.dtype)
                passed.append(address)
            elif isinstance(argument, (int, float)):
                kinds.append(type(argument))
                passed.append(argument)
            else:
                kinds.append((argument.base.dtype, *argument.block_shape))
                passed.append(argument)
        values = tuple(constants.values())
        device = torch.cuda.current_device()
        key = (device, num_warps, num_stages, *kinds, values)
        compiled = self._compiled.get(key)
        if compiled is not None:
            stream = driver.active.get_current_stream(device)
            compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *passed, *values)
            return
        assert [*constants] == self._kernel.arg_names[len(arguments) :], f"{[*constants]} in another order"
        self._compiled[key] = self._kernel[grid](
            *arguments, **constants, num_warps=num_warps, num_stages=num_stages, launch_pdl=True
        )

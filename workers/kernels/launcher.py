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

_F = TypeVar("_F")


class Launcher(Generic[_F]):
    """Of one kernel, whose constants are its last parameters."""

    def __init__(self, kernel: JITFunction[_F]) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Hashable, ...], CompiledKernel | None] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: tuple[Tensor | float, ...],
        constants: Mapping[str, Hashable],
        *,
        num_warps: int,
        num_stages: int = 3,
    ) -> None:
        """`constants` in the order of the kernel's parameters."""
        values = tuple(constants.values())
        kinds = tuple([_kind(each) for each in arguments])
        key = (torch.cuda.current_device(), num_warps, num_stages, kinds, values)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments, *values)
            return
        assert [*constants] == self._kernel.arg_names[len(arguments) :], f"{[*constants]} in another order"
        self._compiled[key] = self._kernel[grid](
            *arguments, **constants, num_warps=num_warps, num_stages=num_stages, launch_pdl=True
        )


def _kind(argument: Tensor | float) -> Hashable:
    """Whatever Triton may compile apart: dtypes, addresses and numbers that are multiples of 16, ones, wide numbers."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return 1 if argument == 1 else (argument % 16 == 0, argument.bit_length() > 31)
    return None

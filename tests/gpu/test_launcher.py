"""A launch never takes what was compiled for other arguments: addresses, numbers and dtypes in any order."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from tests.support.tensor_errors import error

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_launch_suits_its_arguments(seed: int) -> None:
    """Aligned addresses are read 16 bytes at a time, and a size of 1 or a multiple of 16 is known to the compiler."""
    from workers.kernels.activation import _silu_mul
    from workers.kernels.launcher import Launcher

    launch = Launcher(_silu_mul)
    cases = [
        (dtype, offset, size)
        for dtype in (torch.bfloat16, torch.float32)
        for offset in (0, 1, 4, 8)
        for size in (1, 7, 16, 48, 100, 1024)
    ]
    random.Random(seed).shuffle(cases)
    for dtype, offset, size in [*cases, *reversed(cases)]:
        rows = 3
        both = torch.randn(offset + rows * 2 * size, device=CUDA).to(dtype)[offset:].view(rows, 2 * size)
        out = torch.full((offset + rows * size + 1,), 7.0, dtype=dtype, device=CUDA)
        constants = {"BLOCK": 1024, "BLOCKS": 1, "PENDING": 0}
        launch((rows, 1, 1), (both, out[offset:], size, both, 1, 0.0), constants, num_warps=4)
        want = F.silu(both[:, :size].float()).to(dtype) * both[:, size:]
        assert error(out[offset:-1].view(rows, size), want) < 1e-2, f"{dtype}, {size} from {offset} on"
        assert (out[:offset] == 7).all() and out[-1] == 7, f"{dtype}, {size} from {offset} on: written beside"

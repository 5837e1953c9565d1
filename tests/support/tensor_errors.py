"""How far a result is from what it should be."""

from __future__ import annotations

import torch
from torch import Tensor


def error(out: Tensor, want: Tensor) -> float:
    """Relative, in the norm; NaN is infinitely wrong."""
    return torch.nan_to_num((out.float() - want.float()).norm() / want.float().norm(), nan=float("inf")).item()

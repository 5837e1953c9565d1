"""Products of a few rows with one large matrix, which read the matrix once at the rate of memory, in Triton.

The grouped product over one slot. Reference: torch.nn.functional.linear; FusedMlp's for the gated one.

Shapes: T rows, d inputs, I outputs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from workers.kernels.expert_routing import RowPlan
from workers.kernels.grouped_gemm import down, gate_up
from workers.kernels.tactics import ExpertTactic


def skinny_linear(x: Tensor, weight: Tensor, tactic: ExpertTactic) -> Tensor:
    """x [T, d], weight [I, d] -> [T, I]. T is at most the tactic's rows."""
    return down(x, weight.unsqueeze(0), _plan(x.shape[0], tactic.rows, x.device), tactic)


def skinny_gate_up(x: Tensor, both: Tensor, tactic: ExpertTactic) -> Tensor:
    """x [T, d], both [2 I, d], gates first -> silu(gate) * up, [T, I]. T is at most the tactic's rows."""
    return gate_up(x, both.unsqueeze(0), _plan(x.shape[0], tactic.rows, x.device), tactic, 1)


@cache
def _plan(count: int, tile: int, device: torch.device) -> RowPlan:
    """All rows are one tile of slot 0. Kept for ever: a captured graph goes on to read it."""
    assert count <= tile, "more rows than a tile holds"
    order = torch.arange(count, dtype=torch.int32, device=device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    return RowPlan(order, zero, zero, zero + count, tile)

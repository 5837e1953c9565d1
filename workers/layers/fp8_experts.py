"""What the experts of a layer compute where they are stored in fp8 blocks. References: SparseMlp, and
workers.layers.block_fp8 for the rounding.

Shapes: T tokens, d hidden, k slots per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels.expert_routing import plan_rows
from workers.kernels.fp8 import BLOCK
from workers.kernels.fp8_grouped_gemm import ExpertMatrices, down, gate_up
from workers.kernels.fp8_rows import QuantizedRows, TiledRows, silu_mul_quantized, tile_rows
from workers.kernels.grouped_gemm import single_rows
from workers.kernels.norms import ExpertOutputs
from workers.kernels.tactic_table import RULES, TacticTable
from workers.kernels.tactics import SINGLE_ENTRIES
from workers.layers.packed_weights import PackedExperts


class Fp8Experts:
    def __init__(self, packed: PackedExperts, tactics: TacticTable = RULES) -> None:
        assert packed.both_scales is not None and packed.downs_scales is not None, "stored in another dtype"
        self._both = ExpertMatrices(packed.both, packed.both_scales)
        self._downs = ExpertMatrices(packed.downs, packed.downs_scales)
        self._tactics = tactics
        self._rows = torch.arange(SINGLE_ENTRIES, dtype=torch.int32, device=packed.both.device)

    def __call__(self, x: QuantizedRows, chosen: Tensor, weights: Tensor, base: Tensor | None) -> ExpertOutputs:
        """x [T, d], chosen and weights [T, k], base [T, d]."""
        tactics = self._tactics.fp8_experts(chosen.shape, self._both.values.shape)
        if tactics is None:
            outs, places = self._many(x, chosen)
            return ExpertOutputs(outs, weights, base, places)
        if tactics.sort:
            plan = plan_rows(chosen, len(self._both.values), tactics.first.rows)
        else:
            plan = single_rows(chosen, self._rows)
        inner = gate_up(x, self._both, plan, tactics.first, chosen.shape[1])
        return ExpertOutputs(down(inner, self._downs, plan, tactics.second), weights, base, None)

    def _many(self, x: QuantizedRows, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in tiles, their outputs, and where each entry's is."""
        from workers.kernels.fp8_products import tiled_product

        plan = plan_rows(chosen, len(self._both.values), BLOCK)
        tiled = tile_rows(x, plan, chosen.shape[1])
        inner = silu_mul_quantized(tiled_product(tiled, self._both))
        return tiled_product(TiledRows(inner, tiled.experts, tiled.places), self._downs), tiled.places

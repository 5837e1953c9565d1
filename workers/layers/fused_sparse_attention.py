"""Latent attention with a sparse indexer, of few launches, for SM90. Reference: LatentAttention.

Shapes: T tokens, P of them choose what they see, d hidden, H heads, N unrotated and R rotated query/key features,
V value size, Q query latent size, I index heads, J index head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.attention.hopper_dsa import HopperDsaStep, SparseRows
from workers.attention.index_tools import QuantizedQueries
from workers.kernels.index_rows import quantize_queries, write_index_keys
from workers.kernels.latent_entry import ENDS_ROWS
from workers.kernels.norms import rms_norm
from workers.kernels.rotary import RotationTable
from workers.kernels.tactic_table import RULES
from workers.layers.fused_attention import FusedMla, project_read
from workers.layers.mla import LatentAttention
from workers.layers.packed_weights import PackedLinear


class FusedDsa:
    """x [T, d] -> [T, d]. What is projected from x is one product, what from the query latents another.

    Index weights are computed in the model's dtype: the keys that they weigh are in fp8.
    """

    def __init__(self, attention: LatentAttention) -> None:
        indexer = attention.indexer
        assert indexer is not None and attention.shape.query_latent_size is not None, "an indexer needs query latents"
        self._layer = attention.layer
        self._shape = attention.shape
        self._attention = attention
        self._indexer = indexer
        indexer.weights_proj.weight.data = indexer.weights_proj.weight.to(attention.q_a_proj.weight.dtype)
        self._mla = FusedMla(attention, (indexer.wk, indexer.weights_proj))
        self._second = PackedLinear([attention.q_b_proj, indexer.wq_b])
        self._num_queries = attention.q_b_proj.weight.shape[0]

    def __call__(self, x: Tensor, rotation: RotationTable, step: HopperDsaStep, read: Tensor | None = None) -> Tensor:
        """read [N]: rows; if given, [N, d] of these."""
        shape, attention, indexer = self._shape, self._attention, self._indexer
        latents, kv, keys, weights = self._mla.project(x)
        latents = rms_norm(latents, attention.q_a_layernorm.weight, attention.q_a_layernorm.eps)
        q, index_queries = self._queries(latents, asked=step.sparse is not None)
        few = len(q) if len(q) <= ENDS_ROWS else 0  # whichever of them go that way: those of prompts cost little
        absorbed = self._mla.enter(q, kv, rotation, step.positions, step.pages, step.slots, few)
        norm = indexer.k_norm
        block_size = step.pages.shape[2]
        write_index_keys(
            keys,
            rotation,
            step.positions,
            norm.weight,
            norm.bias,
            norm.eps,
            step.index_pages,
            block_size,
            step.slots,
            self._layer,
        )
        out = torch.empty(*q.shape[:2], shape.value_dim, dtype=x.dtype, device=x.device)
        if singles := step.dense_singles:
            inside = None if absorbed is None else absorbed[:singles]
            self._mla.generate(
                q[:singles],
                inside,
                out[:singles],
                lambda a, rope: step.dense.decode(self._layer, a, rope, RULES),
            )
        if step.dense.new is not None:
            rows = step.dense_prompts
            seen = rows.room(out)
            self._mla.forward_context(rows.take(q), rows.take(kv), seen, step.dense)
            rows.put(out, seen)
        if step.sparse is not None:
            self._attend_chosen(q, absorbed, index_queries, weights, rotation, step, step.sparse, out)
        return project_read(attention.o_proj, out.flatten(1), read)

    def _queries(self, latents: Tensor, *, asked: bool) -> tuple[Tensor, Tensor]:
        """[T, Q] -> [T, H, N + R] and [T, I, J], the latter empty when nobody asks."""
        width = self._shape.nope_dim + self._shape.rope_dim
        if asked:
            both = self._second(latents)
        else:
            both = F.linear(latents, self._second.weight[: self._num_queries])
        q, index = both.split([self._num_queries, both.shape[1] - self._num_queries], -1)
        return q.unflatten(-1, (-1, width)), index.unflatten(-1, (-1 if asked else 0, self._indexer.head_dim))

    def _attend_chosen(
        self,
        q: Tensor,
        absorbed: Tensor | None,
        index_queries: Tensor,
        weights: Tensor,
        rotation: RotationTable,
        step: HopperDsaStep,
        sparse: SparseRows,
        out: Tensor,
    ) -> None:
        rows = sparse.rows
        asked = quantize_queries(
            rows.take(index_queries), rows.take(weights), rotation, sparse.positions, self._indexer.scale
        )
        chosen = step.choose(self._layer, QuantizedQueries(*asked))
        seen = rows.room(out)
        inside = None if absorbed is None else rows.take(absorbed)
        self._mla.generate(rows.take(q), inside, seen, lambda a, rope: step.attend(self._layer, a, rope, chosen))
        rows.put(out, seen)

"""Multi-head latent attention, with a sparse indexer where the model has one.

Shapes: T tokens, d hidden, H heads, N unrotated and R rotated query/key features, V value size, L latent size,
Q query latent size, C visible tokens, A rows that attend in latent space, I index heads, J index head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.attention.merging import attend_part, merge
from workers.attention.mla_interface import ContextKind, DenseContext, IndexQueries, MlaStep
from workers.layers.linear import Linear, Partition
from workers.layers.norm import LayerNorm, RmsNorm
from workers.layers.rotary import Rotation

_EPS = 1e-6  # of the norms inside attention, whatever the model's other norms use


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerShape:
    num_heads: int  # I
    head_dim: int  # J
    topk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaShape:
    hidden_size: int  # d
    num_heads: int  # H
    nope_dim: int  # N
    rope_dim: int  # R
    value_dim: int  # V
    latent_size: int  # L
    query_latent_size: int | None  # Q; None: queries are projected in one go
    bias: bool
    scale: float
    indexer: IndexerShape | None  # needs a query latent


class Indexer(nn.Module):
    """Small keys and queries that say which tokens matter. The first R features are rotated, half-split."""

    def __init__(self, shape: MlaShape, indexer: IndexerShape, dtype: torch.dtype) -> None:
        super().__init__()
        assert shape.query_latent_size is not None, "index queries are made of the query latent"
        self.rope_dim = shape.rope_dim
        self.num_heads = indexer.num_heads
        self.head_dim = indexer.head_dim
        self.scale = (indexer.num_heads * indexer.head_dim) ** -0.5
        # Every rank has all index heads: the choice must be the same everywhere.
        replicated, width = Partition.REPLICATED, indexer.num_heads * indexer.head_dim
        self.wq_b = Linear(shape.query_latent_size, width, partition=replicated, dtype=dtype)
        self.wk = Linear(shape.hidden_size, indexer.head_dim, partition=replicated, dtype=dtype)
        self.k_norm = LayerNorm(indexer.head_dim, _EPS, dtype=dtype)
        self.weights_proj = Linear(
            shape.hidden_size, indexer.num_heads, partition=replicated, dtype=torch.promote_types(dtype, torch.float32)
        )

    def keys(self, x: Tensor, rotation: Rotation) -> Tensor:
        """x [T, d] -> [T, J], normed, then rotated: as cached."""
        return self._rotate(self.k_norm(self.wk(x)).unsqueeze(1), rotation).squeeze(1)

    def ask(self, x: Tensor, query_latents: Tensor, rotation: Rotation) -> IndexQueries:
        """x [P, d], query_latents [P, Q], rotation of the same rows."""
        queries = self._rotate(self.wq_b(query_latents).unflatten(-1, (self.num_heads, -1)), rotation)
        # relu(s * dot) is s * relu(dot): both scales sit in the weights.
        return IndexQueries(queries, self.weights_proj(x.to(self.weights_proj.weight.dtype)) * self.scale)

    def _rotate(self, x: Tensor, rotation: Rotation) -> Tensor:
        return torch.cat((rotation.apply(x[..., : self.rope_dim]), x[..., self.rope_dim :]), -1)


class LatentAttention(nn.Module):
    """Projects, rotates, writes latents and index keys, attends; `layer` is its index in the cache's regions.

    The rotated features are interleaved in the weights, and stay where they are in the cache.
    """

    def __init__(self, layer: int, shape: MlaShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.shape = shape
        column, row, replicated = Partition.COLUMN, Partition.ROW, Partition.REPLICATED
        d, queries = shape.hidden_size, shape.num_heads * (shape.nope_dim + shape.rope_dim)
        if shape.query_latent_size is None:
            self.q_proj = Linear(d, queries, partition=column, dtype=dtype)
        else:
            size = shape.query_latent_size
            self.q_a_proj = Linear(d, size, partition=replicated, bias=shape.bias, dtype=dtype)
            self.q_a_layernorm = RmsNorm(size, _EPS, dtype=dtype)
            self.q_b_proj = Linear(size, queries, partition=column, dtype=dtype)
        self.kv_a_proj_with_mqa = Linear(
            d, shape.latent_size + shape.rope_dim, partition=replicated, bias=shape.bias, dtype=dtype
        )
        self.kv_a_layernorm = RmsNorm(shape.latent_size, _EPS, dtype=dtype)
        self.kv_b_proj = Linear(
            shape.latent_size, shape.num_heads * (shape.nope_dim + shape.value_dim), partition=column, dtype=dtype
        )
        self.o_proj = Linear(shape.num_heads * shape.value_dim, d, partition=row, bias=shape.bias, dtype=dtype)
        self.indexer = None if shape.indexer is None else Indexer(shape, shape.indexer, dtype)

    def forward(self, x: Tensor, rotation: Rotation, step: MlaStep) -> Tensor:
        """x [T, d] -> [T, d]."""
        query_latents, q = self._queries(x, rotation)
        latents = self._latents(x, rotation)
        step.write(self.layer, latents, None if self.indexer is None else self.indexer.keys(x, rotation))
        out = x.new_empty(len(x), self.shape.num_heads, self.shape.value_dim)
        for context in step.contexts:
            mine = slice(context.start, context.end)
            out[mine] = self.forward_context(context, q[mine], latents[mine], step)
        rows = step.generation_rows
        if rows is not None:
            index = self._ask(x, query_latents, rotation, step.sparse_rows)
            out.index_copy_(0, rows, self.forward_generation(q.index_select(0, rows), index, step))
        return self.o_proj(out.flatten(1))

    def forward_context(self, context: DenseContext, q: Tensor, latents: Tensor, step: MlaStep) -> Tensor:
        """The one way for tokens that attend to expanded keys and values: no cached token can be forgotten.

        q [n, H, N + R] rotated, latents [n, L + R] the tokens' own (already written) -> [n, H, V].
        """
        if context.kind is ContextKind.FRESH:
            k, v = self._expand(latents)
            return self._attend(q, k, v, None)
        if context.kind is ContextKind.CACHED:
            k, v = self._expand(step.cached_rows(self.layer, context, 0, context.context))
            return self._attend(q, k, v, context.mask)
        k, v = self._expand(latents)
        merged = attend_part(q, k, v, scale=self.shape.scale, causal=True)
        for start, end in context.pieces:
            k, v = self._expand(step.cached_rows(self.layer, context, start, end))
            merged = merge(merged, attend_part(q, k, v, scale=self.shape.scale, causal=False))
        return merged.out.to(q.dtype)

    def forward_generation(self, q: Tensor, index: IndexQueries | None, step: MlaStep) -> Tensor:
        """q [A, H, N + R] rotated -> [A, H, V]: queries into latent space, what they see out of it."""
        nope, rope = q.split([self.shape.nope_dim, self.shape.rope_dim], -1)
        absorbed = torch.bmm(nope.transpose(0, 1), self.key_weights).transpose(0, 1)  # [A, H, L]
        seen = step.generate(self.layer, torch.cat((absorbed, rope), -1), index)  # [A, H, L]
        return torch.bmm(seen.transpose(0, 1), self.value_weights.transpose(1, 2)).transpose(0, 1)

    @property
    def key_weights(self) -> Tensor:
        """W_UK [H, N, L], a view of the loaded kv_b_proj."""
        return self._kv_weights[:, : self.shape.nope_dim]

    @property
    def value_weights(self) -> Tensor:
        """W_UV [H, V, L], a view of the loaded kv_b_proj."""
        return self._kv_weights[:, self.shape.nope_dim :]

    @property
    def _kv_weights(self) -> Tensor:
        return self.kv_b_proj.matrix().view(-1, self.shape.nope_dim + self.shape.value_dim, self.shape.latent_size)

    def _queries(self, x: Tensor, rotation: Rotation) -> tuple[Tensor | None, Tensor]:
        """Query latents [T, Q], if the model has them, and rotated queries [T, H, N + R]."""
        if self.shape.query_latent_size is None:
            query_latents, q = None, self.q_proj(x)
        else:
            query_latents = self.q_a_layernorm(self.q_a_proj(x))
            q = self.q_b_proj(query_latents)
        q = q.unflatten(-1, (-1, self.shape.nope_dim + self.shape.rope_dim))
        nope, rope = q.split([self.shape.nope_dim, self.shape.rope_dim], -1)
        return query_latents, torch.cat((nope, rotation.apply_interleaved(rope)), -1)

    def _latents(self, x: Tensor, rotation: Rotation) -> Tensor:
        """[T, L + R]: as cached."""
        latent, rope = self.kv_a_proj_with_mqa(x).split([self.shape.latent_size, self.shape.rope_dim], -1)
        rotated = rotation.apply_interleaved(rope.unsqueeze(1)).squeeze(1)
        return torch.cat((self.kv_a_layernorm(latent), rotated), -1)

    def _expand(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Latent rows [C, L + R] -> keys [C, H, N + R] and values [C, H, V]. The rows are rotated already."""
        latent, rope = rows.split([self.shape.latent_size, self.shape.rope_dim], -1)
        both = self.kv_b_proj(latent).unflatten(-1, (-1, self.shape.nope_dim + self.shape.value_dim))
        nope, values = both.split([self.shape.nope_dim, self.shape.value_dim], -1)
        return torch.cat((nope, rope.unsqueeze(1).expand(-1, nope.shape[1], -1)), -1), values

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[n, H, D], [C, H, D], [C, H, V] -> [n, H, V]; causal without a mask."""
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.shape.scale)
        return out.squeeze(0).transpose(0, 1)

    def _ask(
        self, x: Tensor, query_latents: Tensor | None, rotation: Rotation, rows: Tensor | None
    ) -> IndexQueries | None:
        if rows is None:
            return None
        assert self.indexer is not None and query_latents is not None, "sparse rows without an indexer"
        mine = Rotation(rotation.cos.index_select(0, rows), rotation.sin.index_select(0, rows))
        return self.indexer.ask(x.index_select(0, rows), query_latents.index_select(0, rows), mine)

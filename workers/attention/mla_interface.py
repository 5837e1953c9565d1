"""What a backend promises to multi-head latent attention (MLA), with or without a sparse indexer.

Shapes: T tokens of the step, A rows of T that attend to latents directly, P of them sparsely, H query heads,
L latent size, R rotary size, C context, I index heads, J index head size. A latent row is [normed latent (L) | rotated
key (R)]; an index row is a key [J]. The rows of a sequence lie in one block table, latents and index keys alike.

A sequence's tokens of one step attend in one of two ways. *Context*: latents are expanded to keys and values of all
heads; what prompts do while they are short enough to be dense. *Generation*: the query is brought into latent space
instead and all heads share the latent rows; what single tokens do, and whatever attends sparsely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from workers.attention.interface import AttentionBatch, KvCache

LATENTS = "latents"  # names of regions
INDEX_KEYS = "index_keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaProblem:
    """What is asked of a backend: fixed for the life of a model."""

    num_heads: int  # H
    latent_size: int  # L
    rope_size: int  # R
    block_size: int
    dtype: torch.dtype
    scale: float
    index_topk: int | None = None  # None: every token sees its whole context
    index_heads: int | None = None  # I and J, where there is an indexer; None: not said
    index_head_dim: int | None = None
    sliding_window: int | None = None
    nope_size: int | None = None  # unrotated features of a query head; None: not said
    value_size: int | None = None
    max_piece_tokens: int = 4096  # cached tokens that context expands at once; it costs H keys and values for each


class ContextKind(StrEnum):
    """How the tokens of one sequence find what they see."""

    FRESH = "fresh"  # nothing is cached: the step's own tokens are all
    CACHED = "cached"  # cached and new tokens at once
    CHUNKED = "chunked"  # cached tokens in pieces, then the new ones, results merged


@dataclass(frozen=True, slots=True)
class DenseContext:
    """One sequence of the step in context. `pieces` are the runs [start, end) of its cached positions, none empty."""

    kind: ContextKind
    sequence: int  # row of the block table
    start: int  # its tokens are rows [start, end) of T
    end: int
    num_cached: int
    pieces: tuple[tuple[int, int], ...]  # CHUNKED only
    mask: Tensor | None  # CACHED only: [end - start, C] of the model's dtype, 0 or -inf

    @property
    def context(self) -> int:
        """C: visible tokens of the last query, itself included."""
        return self.num_cached + self.end - self.start


class IndexQueries(NamedTuple):
    """What the sparse rows ask the index keys: score = sum over heads of weight * relu(query · key)."""

    queries: Tensor  # [P, I, J]
    weights: Tensor  # [P, I] fp32, every scale included


class MlaStep(Protocol):
    """One step of one group, all layers. Valid until the next `begin`; used by one thread."""

    @property
    def contexts(self) -> Sequence[DenseContext]: ...

    @property
    def generation_rows(self) -> Tensor | None:
        """[A] int64: rows of T, in the order that `generate` wants. None: no row."""
        ...

    @property
    def sparse_rows(self) -> Tensor | None:
        """[P] int64: the last P of `generation_rows`. None: no row."""
        ...

    def write(self, layer: int, latents: Tensor, index_keys: Tensor | None) -> None:
        """Caches [T, L + R], and [T, J] when the model has an indexer: always, whether or not this step needs it."""
        ...

    def cached_rows(self, layer: int, context: DenseContext, start: int, end: int) -> Tensor:
        """Latent rows of positions [start, end), [end - start, L + R]; those of this step too, once written."""
        ...

    def generate(self, layer: int, queries: Tensor, index: IndexQueries | None) -> Tensor:
        """queries [A, H, L + R], in latent space and rotated -> what they see of the latents, [A, H, L].

        `index` exactly when there are sparse rows. Each row sees its sequence's tokens up to and including itself;
        a sparse row those `index_topk` of them that score highest (ties are broken in any way).
        """
        ...


class MlaBackend(Protocol):
    """Made once per model and rank from an `MlaProblem`."""

    @property
    def name(self) -> str: ...

    def begin(self, batch: AttentionBatch, group: int, cache: KvCache) -> MlaStep:
        """Computes once what all layers of the step share. Mutates only blocks that this step starts to write."""
        ...

"""FlashInfer's FA3 for tokens of several per sequence: over keys and values side by side, or over K/V pages.

A plan is made once per step, from host metadata alone, and serves all layers: nothing in a step waits for the device.

Shapes: n query tokens, C keys, H query heads, K key/value heads, D query/key size, V value size.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flashinfer
import torch
from torch import Tensor

_WORKSPACE_BYTES = 64 << 20


class HeadShape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    qk_dim: int
    value_dim: int
    scale: float
    dtype: torch.dtype


class Ragged:
    """Attention of packed sequences over packed keys and values."""

    def __init__(self, shape: HeadShape, workspace: Tensor) -> None:
        self._shape = shape
        self._wrapper: Any = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="fa3")

    def plan(self, query_lens: Sequence[int], key_lens: Sequence[int], *, causal: bool) -> None:
        """No length is 0. Causal: the last query of a sequence sees all its keys."""
        shape = self._shape
        self._wrapper.plan(
            starts(query_lens),
            starts(key_lens),
            shape.num_heads,
            shape.num_kv_heads,
            shape.qk_dim,
            head_dim_vo=shape.value_dim,
            causal=causal,
            sm_scale=shape.scale,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        """q [n, H, D], k [C, K, D], v [C, K, V] -> [n, H, V]. Rows and heads of any stride."""
        return self._wrapper.run(q, k, v, out=out)

    def attend_part(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """With the log (of base 2) of the sum of exp(score), fp32 [n, H]."""
        return self._wrapper.run(q, k, v, return_lse=True)


class Paged:
    """Attention of packed sequences over K/V pages."""

    def __init__(self, shape: HeadShape, block_size: int, workspace: Tensor) -> None:
        self._shape = shape
        self._block_size = block_size
        self._wrapper: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend="fa3")

    def plan(self, query_lens: Sequence[int], context_lens: Sequence[int], pages: Tensor) -> None:
        """pages int32 on the device: those of each sequence's context side by side. Causal."""
        shape, size = self._shape, self._block_size
        last = torch.tensor([(context - 1) % size + 1 for context in context_lens], dtype=torch.int32)
        self._wrapper.plan(
            starts(query_lens),
            starts([-(-context // size) for context in context_lens]),
            pages,
            last,
            shape.num_heads,
            shape.num_kv_heads,
            shape.qk_dim,
            size,
            causal=True,
            sm_scale=shape.scale,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
        )

    def attend(self, q: Tensor, keys_and_values: Tensor, out: Tensor) -> Tensor:
        """q [n, H, D], keys_and_values [pages, 2, K, S, D] -> out [n, H, D]."""
        return self._wrapper.run(q, keys_and_values, out=out)


def starts(lens: Sequence[int]) -> Tensor:
    """int32 [len + 1] on the host: 0, then the running sum."""
    out = torch.zeros(len(lens) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lens, dtype=torch.int32), 0, out=out[1:])
    return out


def workspace(device: torch.device) -> Tensor:
    """What all wrappers of a rank share: their launches follow each other on one stream."""
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

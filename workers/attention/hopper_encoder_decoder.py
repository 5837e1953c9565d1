"""Attention of encoder–decoder models on SM90: single queries by our paged decode kernel, over their own tokens with a
bias and over the encoder's; prompts and encoder inputs padded, by torch.

Shapes: B sequences, H heads (each with its own key and value), D head size.
"""

from __future__ import annotations

from torch import Tensor

from workers.attention.interface import AttentionProblem
from workers.attention.padded import PaddedBackend
from workers.kernels.paged_decode import paged_decode
from workers.kernels.tactics import decode_tactic


class PagedQueries:
    """See `SingleQueriesMaker`. Blocks are read where they lie, up to lengths that are on the device: the launches are
    the same at every length."""

    def __init__(self, pages: Tensor, table: Tensor, last: Tensor, scale: float, bias: Tensor | None) -> None:
        self._pages, self._table, self._last, self._scale, self._bias = pages, table, last, scale, bias
        self._tactic = decode_tactic(len(table) * pages.shape[3])

    @property
    def num_queries(self) -> int:
        return len(self._table)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        out = paged_decode(q, self._pages, self._table, self._last, layer, self._scale, self._tactic, self._bias)
        return out.view(q.shape)


def hopper_backend(problem: AttentionProblem) -> PaddedBackend:
    return PaddedBackend(problem, PagedQueries)

"""Contexts gathered from K/V pages, head by head, as plain torch attends them.

Shapes: B sequences, K key/value heads, D head size, S block size, M blocks, C context.
"""

from __future__ import annotations

import torch
from torch import Tensor


class PageGather:
    """Over `pages` [blocks, layers, 2, K, S, D]. Copies come out as [B, K, C, D], which one call attends."""

    def __init__(self, pages: Tensor) -> None:
        _, self._num_layers, _, self._num_heads, block_size, self._head_dim = pages.shape
        self._flat = pages.view(-1, block_size * self._head_dim)  # [blocks * layers * 2 * K, S * D]

    def rows(self, blocks: Tensor) -> Tensor:
        """Block ids [B, M] -> rows [2 * B * K * M] of layer 0."""
        heads = self._num_heads
        first = (blocks * (self._num_layers * 2 * heads)).view(1, len(blocks), 1, -1)
        halves = torch.arange(0, 2 * heads, heads, device=blocks.device).view(2, 1, 1, 1)
        return (first + halves + torch.arange(heads, device=blocks.device).view(1, 1, heads, 1)).flatten()

    def gather(self, layer: int, rows: Tensor, num_sequences: int, context: int) -> tuple[Tensor, Tensor]:
        """K and V of whole contexts, each [B, K, C, D]."""
        copies = self._flat.index_select(0, rows + layer * (2 * self._num_heads))
        both = copies.view(2, num_sequences, self._num_heads, -1, self._head_dim)[:, :, :, :context]
        return both[0], both[1]

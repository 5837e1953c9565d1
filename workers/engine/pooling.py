"""Embeddings: the final hidden states of a prompt, made one vector, or as they are. Not normalised."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from cluster.request import Pooling


class PooledRow(NamedTuple):
    """What one chunk adds."""

    id: int
    pooling: Pooling
    start: int  # hidden states start … end − 1 of the step are its own
    end: int
    position: int  # of the first one
    is_last: bool


class Pooler:
    """Carries sums over the chunks of a prompt, in float32 on the device."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def pool(self, hidden: Tensor, rows: Iterable[PooledRow]) -> dict[int, Tensor]:
        """The vectors [d] float32 of the prompts that end with this step, by sequence id. hidden: [T, d]. Where all
        states are wanted, which only an encoder's are, in one piece: [S, d] float32."""
        vectors: dict[int, Tensor] = {}
        for row in rows:
            match row.pooling:
                case Pooling.LAST:
                    if row.is_last:
                        vectors[row.id] = hidden[row.end - 1].float()
                case Pooling.STATES:
                    assert row.is_last and row.position == 0, f"{row}: a piece of its states"
                    vectors[row.id] = hidden[row.start : row.end].float()
                case Pooling.MEAN:
                    total = hidden[row.start : row.end].sum(dim=0, dtype=torch.float32)
                    if row.position > 0:  # at 0 it begins, or begins again after a preemption
                        total += self._sums[row.id]
                    self._sums[row.id] = total
                    if row.is_last:
                        vectors[row.id] = total / (row.position + row.end - row.start)
        return vectors

    def forget(self, ids: Iterable[int]) -> None:
        for id_ in ids:
            self._sums.pop(id_, None)

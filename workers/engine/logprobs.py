"""Log probabilities of the model's own distribution: log softmax of the raw logits, in float32.

Shapes: R rows, V vocabulary, k alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cluster.request import TokenLogprobs

# Rows x V whose logits exist at a time when all positions of a chunk are wanted.
_SLICE_ELEMENTS = 1 << 22


class Logprobs(NamedTuple):
    """Of one token per row, and the k most likely ones; on the device."""

    own: Tensor  # [R] float32
    top: Tensor  # [R, k] float32, descending
    top_ids: Tensor  # [R, k] int64

    def collect(self) -> tuple[TokenLogprobs, ...]:
        """Waits for the device."""
        tops = zip(self.top_ids.tolist(), self.top.tolist(), strict=True)
        return tuple(
            TokenLogprobs(own, tuple(zip(ids, values, strict=True)))
            for own, (ids, values) in zip(self.own.tolist(), tops, strict=True)
        )


def token_logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
    """Of tokens [R] under logits [R, V] of any float dtype; k is `num_top`, or V if that is less."""
    logits = logits.float()
    total = logits.logsumexp(dim=-1, keepdim=True)
    top, top_ids = logits.topk(min(num_top, logits.shape[1]), dim=-1)
    return Logprobs((logits.gather(1, tokens[:, None]) - total)[:, 0], top - total, top_ids)


def hidden_logprobs(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Sequence[int], num_top: int) -> Logprobs:
    """Of `targets` [R] under the hidden states [R, d] before them; R >= 1.

    The logits of all rows never exist at once: the first row's tell how many may.
    """
    wanted = torch.tensor(targets, dtype=torch.int64, device=hidden.device)
    logits = head(hidden[:1])
    parts = [token_logprobs(logits, wanted[:1], num_top)]
    rows = max(1, _SLICE_ELEMENTS // logits.shape[1])
    for start in range(1, len(targets), rows):
        piece = slice(start, start + rows)
        parts.append(token_logprobs(head(hidden[piece]), wanted[piece], num_top))
    return Logprobs(*(torch.cat(each) for each in zip(*parts, strict=True)))


class DrawnRows(NamedTuple):
    """Raw logits kept while a step draws, of the rows that want the same number of alternatives."""

    num_top: int
    rows: list[int]  # of all logits
    logits: Tensor  # [R, V]: a copy

    @classmethod
    def keep(cls, logits: Tensor, num_top_by_row: Sequence[int]) -> list[DrawnRows]:
        """num_top_by_row: −1 where nothing is wanted. A row's result does not depend on what others want."""
        kept = []
        for num_top in sorted({each for each in num_top_by_row if each >= 0}):
            rows = [row for row, each in enumerate(num_top_by_row) if each == num_top]
            kept.append(cls(num_top, rows, logits[torch.tensor(rows, device=logits.device)]))
        return kept

    def of(self, tokens: Tensor) -> Logprobs:
        """tokens: of all rows of the step."""
        at = torch.tensor(self.rows, device=tokens.device)
        return token_logprobs(self.logits, tokens[at], self.num_top)

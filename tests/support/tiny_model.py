"""A model of a few lines that reads its whole context through the block table, like a real one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.attention.interface import AttentionBatch, KvCache

ROW = 8


class TinyModel:
    """hidden(p) = sum over j <= p of cos(0.7 (p - j)) row(token j), rows read from the cache; logits = hidden W.

    A token's result depends on its context only, bit for bit: never on the batch around it or on how it was cut.
    """

    def __init__(self, cache: KvCache, *, vocab_size: int = 97, block_size: int = 4, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(vocab_size, ROW, generator=generator, dtype=torch.float64)
        self.head = torch.randn(ROW, vocab_size, generator=generator, dtype=torch.float64)
        self.rows = cache.layer("rows", 0)  # [num_blocks, block_size, ROW]
        self.block_size = block_size
        self.poison: int | None = None  # forward raises when it sees this token
        self.batches: list[AttentionBatch] = []

    def forward(self, input_ids: Tensor, batch: AttentionBatch, capture_layers: Sequence[int] = ()) -> Tensor:
        assert len(input_ids) == batch.num_tokens > 0
        self.batches.append(batch)
        if self.poison is not None and (input_ids == self.poison).any():
            raise RuntimeError(f"token {self.poison} is more than this model can take")
        group = batch.groups[0]
        slots = group.slot_mapping
        self.rows[slots // self.block_size, slots % self.block_size] = self.embedding[input_ids]
        hidden = torch.empty(len(input_ids), ROW, dtype=torch.float64)
        for i in range(batch.num_sequences):
            pages = self.rows[group.block_table[i].long()].reshape(-1, ROW)
            for t in range(batch.query_starts[i], batch.query_starts[i + 1]):
                hidden[t] = self._mix(pages[: int(batch.positions[t]) + 1])
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.stack([row @ self.head for row in hidden])

    def next_token_logits(self, tokens: Sequence[int]) -> Tensor:
        """[1, V] without any cache."""
        return self.logits(self.final_hidden(tokens)[None])

    def final_hidden(self, tokens: Sequence[int]) -> Tensor:
        """[ROW], of the last token, without any cache."""
        return self._mix(self.embedding[list(tokens)])

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.next_token_logits(tokens).argmax()))
        return tokens[len(prompt) :]

    @staticmethod
    def _mix(rows: Tensor) -> Tensor:
        distance = torch.arange(len(rows) - 1, -1, -1, dtype=torch.float64)
        return (rows * torch.cos(0.7 * distance)[:, None]).sum(0)

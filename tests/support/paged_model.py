"""Drives a model over paged KV without scheduler or block manager: the smallest loop that can be right or wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.attention.interface import AttentionBatch, GroupMetadata
from workers.attention.kv_views import kv_cache
from workers.models.model import CausalModel


@dataclass(slots=True)
class Text:
    """One sequence: all its tokens, how many are in the cache, and where."""

    tokens: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)


class PagedModel:
    """A model bound to a pool of its own. Blocks are handed out in random order and never come back."""

    def __init__(self, model: CausalModel, *, block_size: int, num_blocks: int = 400, fill: float = 0.0) -> None:
        self.model = model
        self.block_size = block_size
        (group,) = model.kv_groups(block_size)
        self.storages = [
            torch.zeros(num_blocks + 1, region.num_layers, region.page_bytes(), dtype=torch.uint8)
            for region in group.regions
        ]
        self.cache = kv_cache(group, self.storages)
        for pages in self.cache.regions.values():
            pages.fill_(fill)
        self.choice = model.bind_kv([self.cache])
        self._free = list(range(1, num_blocks + 1))
        random.Random(0).shuffle(self._free)

    def receive(self, source: PagedModel, texts: Sequence[Text]) -> None:
        """Copies the texts' blocks, same ids, from another pool."""
        for text in texts:
            self._free = [block for block in self._free if block not in text.blocks]
            for mine, theirs in zip(self.storages, source.storages, strict=True):
                mine[text.blocks] = theirs[text.blocks]

    def step(self, work: Sequence[tuple[Text, int]]) -> Tensor:
        """Computes the next n tokens of each text; logits [B, V] of the last of them, in the order of `work`."""
        order = sorted(range(len(work)), key=lambda i: work[i][1] != 1)
        ordered = [work[i] for i in order]
        batch, input_ids = self.batch(ordered)
        hidden = self.model.forward(input_ids, batch)
        for text, count in ordered:
            text.num_computed += count
        logits = self.model.logits(hidden[batch.logits_rows])
        return logits[torch.tensor(order, dtype=torch.int64).argsort()]

    def batch(self, work: Sequence[tuple[Text, int]]) -> tuple[AttentionBatch, Tensor]:
        """The batch and its input ids. Texts with one token to compute must come first."""
        starts, slots, positions, input_ids = [0], [], [], []
        for text, count in work:
            end = text.num_computed + count
            assert count >= 1 and end <= len(text.tokens)
            while len(text.blocks) * self.block_size < end:
                text.blocks.append(self._free.pop())
            for position in range(text.num_computed, end):
                block, offset = divmod(position, self.block_size)
                slots.append(text.blocks[block] * self.block_size + offset)
                positions.append(position)
            input_ids += text.tokens[text.num_computed : end]
            starts.append(starts[-1] + count)
        width = max((len(text.blocks) for text, _ in work), default=0)
        table = torch.zeros(len(work), width, dtype=torch.int32)
        for row, (text, _) in enumerate(work):
            table[row, : len(text.blocks)] = torch.tensor(text.blocks)
        batch = AttentionBatch(
            num_sequences=len(work),
            num_decodes=sum(count == 1 for _, count in work),
            query_lens=[count for _, count in work],
            query_starts=starts,
            context_lens=[text.num_computed + count for text, count in work],
            positions=torch.tensor(positions, dtype=torch.int64),
            groups=(GroupMetadata(table, torch.tensor(slots, dtype=torch.int64)),),
            logits_rows=torch.tensor(starts[1:], dtype=torch.int64) - 1,
        )
        return batch, torch.tensor(input_ids, dtype=torch.int64)

    def generate(self, texts: Sequence[Text], num_tokens: int) -> list[list[int]]:
        """Greedy, all texts together, whatever part of each is already computed."""
        lengths = [len(text.tokens) for text in texts]
        for _ in range(num_tokens):
            logits = self.step([(text, len(text.tokens) - text.num_computed) for text in texts])
            for text, token in zip(texts, logits.argmax(-1).tolist(), strict=True):
                text.tokens.append(token)
        return [text.tokens[length:] for text, length in zip(texts, lengths, strict=True)]

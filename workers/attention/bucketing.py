"""What every plain torch backend does before it attends: sequences into buckets, blocks to gather, masks.

Shapes: B sequences of a bucket, S block size, M blocks of the longest of them, C its context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.attention.interface import AttentionBatch

MAX_BUCKETS = 4
MIN_BUCKET_SEQUENCES = 4


class BucketTable(NamedTuple):
    """Where the contexts of a bucket lie, and which of the gathered tokens each sequence sees."""

    context: int  # C
    blocks: Tensor  # [B, M] int64
    mask: Tensor | None  # [B, 1, 1, C]: 0 or -inf; None when all are equally long


def buckets_by_length(lens: Sequence[int], sequences: Sequence[int]) -> list[list[int]]:
    """All of `sequences`, shortest context of `lens` first, in a few runs of about equal size; none for none."""
    order = sorted(sequences, key=lens.__getitem__)
    count = min(MAX_BUCKETS, max(1, len(order) // MIN_BUCKET_SEQUENCES), len(order))
    edges = [len(order) * i // max(count, 1) for i in range(count + 1)]
    return [order[edges[i] : edges[i + 1]] for i in range(count)]


def bucket_table(contexts: Sequence[int], table: Tensor, block_size: int, dtype: torch.dtype) -> BucketTable:
    """`contexts` [B] shortest first, not empty; `table` [B, blocks] int64."""
    longest = contexts[-1]
    blocks = table[:, : -(-longest // block_size)]
    if contexts[0] == longest:
        return BucketTable(longest, blocks, None)
    lengths = torch.tensor(contexts, device=table.device).view(-1, 1)
    # Shorter sequences repeat their own first block: nobody else's bytes are ever multiplied, not even by 0.
    held = torch.arange(blocks.shape[1], device=table.device) * block_size < lengths
    seen = torch.arange(longest, device=table.device) < lengths
    mask = additive_mask(seen, dtype).view(len(contexts), 1, 1, -1)
    return BucketTable(longest, torch.where(held, blocks, blocks[:, :1]), mask)


def chunk_mask(num_cached: int, context: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[context - num_cached, context]: what each of the last tokens of a context sees, itself included."""
    last_seen = torch.arange(num_cached, context, device=device).view(-1, 1)
    return additive_mask(torch.arange(context, device=device) <= last_seen, dtype)


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, -inf elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def clear_started(batch: AttentionBatch, table: Tensor, pages: Tensor, block_size: int) -> None:
    """Zeroes the last block of sequences that start it now and do not fill it. `pages` [num_blocks, ...].

    What an earlier owner left behind the context is gathered under the mask, and a NaN survives every mask.
    """
    started = [
        (sequence, context // block_size)
        for sequence, (context, new) in enumerate(zip(batch.context_lens, batch.query_lens, strict=True))
        if context % block_size and context // block_size * block_size >= context - new
    ]
    if started:
        sequences, columns = torch.tensor(started, device=table.device).unbind(1)
        pages.index_fill_(0, table[sequences, columns], 0)

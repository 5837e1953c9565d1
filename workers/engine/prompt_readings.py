"""What a step reads off the hidden states of prompts, besides the tokens it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cluster.request import Pooling
from workers.engine.pooling import PooledRow
from workers.engine.step_plan import ScheduledSequence


class PromptReader(NamedTuple):
    """What one sequence wants of its prompt."""

    num_prompt: int
    tokens: list[int]  # of its History: empty where only a vector is wanted
    num_top: int | None  # alternatives with the logprobs of prompt tokens
    pooling: Pooling | None


class PromptRow(NamedTuple):
    """Hidden states start … start + len(targets) − 1 of the step predict `targets`, prompt tokens from `first` on."""

    id: int
    start: int
    first: int
    targets: list[int]  # at least one
    num_top: int


class PromptReadings(NamedTuple):
    prompts: tuple[PromptRow, ...] = ()
    pooled: tuple[PooledRow, ...] = ()


def readings(
    rows: Sequence[ScheduledSequence], query_starts: Sequence[int], readers: Mapping[int, PromptReader]
) -> PromptReadings:
    """Of the rows of a batch, where `readers` has their sequence. query_starts: see AttentionBatch."""
    prompts: list[PromptRow] = []
    pooled: list[PooledRow] = []
    for row, start in zip(rows, query_starts, strict=False):
        reader = readers.get(row.id)
        if reader is None:
            continue
        if reader.pooling is not None:
            end = start + row.num_tokens
            pooled.append(PooledRow(row.id, reader.pooling, start, end, row.start, row.sample))
        if reader.num_top is not None and row.start + 1 < reader.num_prompt:
            # The last prompt token predicts the first emitted one, which is drawn.
            first = row.start + 1
            targets = reader.tokens[first : min(first + row.num_tokens, reader.num_prompt)]
            prompts.append(PromptRow(row.id, start, first, targets, reader.num_top))
    return PromptReadings(tuple(prompts), tuple(pooled))

"""From a step's plan and the rank's mirror to the tensors that the model reads. Host arithmetic in numpy.

Shapes: B sequences, T packed tokens, N positions whose logits are wanted: one of each row that draws, or, where a row
has drafts, the last one before them and all of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.attention.interface import AttentionBatch, EncoderBatch, FixedGroupMetadata, GroupMetadata
from workers.engine.prompt_readings import PromptReadings, readings
from workers.engine.sampler import Draws
from workers.engine.sequence_mirror import BlockTableArray, SequenceMirror
from workers.engine.step_plan import EncodeRow, Literal, Projection, StepPlan

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step on one rank. Sequences with one token come first, otherwise in the order of the plan."""

    input_ids: Tensor  # [T] int64; 0 where the token is on the device only
    attention: AttentionBatch
    previous_tokens: Tensor  # [P] int64: rows of T whose token the previous step sampled,
    previous_rows: Tensor  # [P] int64: at these rows of its plan
    sampled_rows: Tensor  # [N] int64: rows of the plan that draw a token, in the order of the logits
    sampled_ids: list[int]  # [N]: sequences; several times in a row where several tokens are drawn
    sampled_slots: _Ints  # [N]: where the mirror has them
    draws: Draws
    num_logprobs: _Ints  # [N]: alternatives with each drawn token, −1 where no logprobs are wanted
    num_candidates: _Ints  # [N]: the likeliest tokens that a search wants to know of, 0 where none does
    readings: PromptReadings


def build(plan: StepPlan, mirror: SequenceMirror, device: torch.device) -> StepBatch:
    """The batch of a plan that has rows and has been applied to the mirror."""
    rows = plan.sequences
    num_tokens = np.array([row.num_tokens for row in rows], np.int64)
    single = num_tokens == 1
    num_decodes = int(single.sum())
    order = None  # of the plan's rows, unless they stand right already
    if not single[:num_decodes].all():
        permutation = np.argsort(~single, kind="stable")
        order = permutation
        rows = [rows[i] for i in permutation]
        num_tokens = num_tokens[permutation]

    slots = mirror.slots(row.id for row in rows)
    starts = np.array([row.start for row in rows], np.int64)
    context_lens = starts + num_tokens
    query_starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(num_tokens, out=query_starts[1:])
    sequence_of = np.repeat(np.arange(len(rows)), num_tokens)  # [T]
    positions = np.arange(query_starts[-1]) + (starts - query_starts[:-1])[sequence_of]

    literals = chain.from_iterable(row.inputs.tokens if isinstance(row.inputs, Literal) else (0,) for row in rows)
    input_ids = np.fromiter(literals, np.int64, count=int(query_starts[-1]))
    previous = [(i, row.inputs.row) for i, row in enumerate(rows) if not isinstance(row.inputs, Literal)]
    previous_at = np.array(previous, np.int64).reshape(-1, 2)

    draws_token = [row.sample for row in rows]
    read = PromptReadings()
    if mirror.readers:
        read = readings(rows, query_starts.tolist(), mirror.readers)
        pooled = {row.id for row in read.pooled}
        draws_token = [row.sample and row.id not in pooled for row in rows]
    sampled = np.flatnonzero(np.array(draws_token, bool))
    later = np.zeros_like(sampled)  # positions of the row behind the one that draws
    if plan.num_drafts:
        sampled, later = _draft_draws(sampled, np.array([row.num_drafts for row in rows], np.int64))
    sampled_slots = slots[sampled]
    to_device = _Mover(device)
    attention = AttentionBatch(
        num_sequences=len(rows),
        num_decodes=num_decodes,
        query_lens=num_tokens.tolist(),
        query_starts=query_starts.tolist(),
        context_lens=context_lens.tolist(),
        positions=to_device(positions),
        groups=tuple(_group(table, slots, context_lens, sequence_of, positions, to_device) for table in mirror.tables),
        logits_rows=to_device(query_starts[1:][sampled] - 1 - later),
        fixed=tuple(_fixed_group(table, slots, to_device) for table in mirror.fixed_tables),
    )
    return StepBatch(
        input_ids=to_device(input_ids),
        attention=attention,
        previous_tokens=to_device(query_starts[previous_at[:, 0]]),
        previous_rows=to_device(previous_at[:, 1]),
        sampled_rows=to_device(sampled if order is None else order[sampled]),
        sampled_ids=[rows[i].id for i in sampled.tolist()],
        sampled_slots=sampled_slots,
        draws=_draws(mirror, sampled_slots, context_lens[sampled] - later),
        num_logprobs=mirror.num_logprobs[sampled_slots],
        num_candidates=mirror.num_candidates[sampled_slots],
        readings=read,
    )


def _draft_draws(sampled: _Ints, num_drafts: _Ints) -> tuple[_Ints, _Ints]:
    """Each of `sampled` once for each of its draws, and how many positions of its row lie behind that draw's."""
    counts = 1 + num_drafts[sampled]
    ends = np.cumsum(counts)
    later = np.repeat(ends, counts) - 1 - np.arange(ends[-1]) if len(sampled) else sampled
    return np.repeat(sampled, counts), later


def _group(
    table: BlockTableArray, slots: _Ints, context_lens: _Ints, sequence_of: _Ints, positions: _Ints, to_device: _Mover
) -> GroupMetadata:
    width = -(-int(context_lens.max()) // table.block_size)
    block_table = table.rows[slots, :width]
    slot_mapping = block_table[sequence_of, positions // table.block_size] * table.block_size
    slot_mapping += positions % table.block_size
    return GroupMetadata(to_device(block_table), to_device(slot_mapping))


def _fixed_group(table: BlockTableArray, slots: _Ints, to_device: _Mover) -> FixedGroupMetadata:
    lens = table.extents[slots]
    width = -(-int(lens.max()) // table.block_size)
    return FixedGroupMetadata(to_device(table.rows[slots, :width]), lens.tolist())


def build_encodes(rows: Sequence[EncodeRow], block_size: int, device: torch.device) -> tuple[Tensor, EncoderBatch]:
    """The packed encoder inputs [S] int64 of a plan that has some, and where their output goes."""
    to_device = _Mover(device)
    lens = [len(row.tokens) for row in rows]
    input_ids = np.fromiter(chain.from_iterable(row.tokens for row in rows), np.int64, count=sum(lens))
    slots = [_slots(row, block_size) for row in rows]
    return to_device(input_ids), EncoderBatch(lens, to_device(np.concatenate(slots)))


def build_projections(rows: Sequence[Projection], block_size: int, device: torch.device) -> EncoderBatch:
    """Where the output lies that decoder layers make their keys and values of, and these go: a block is an input."""
    slots = [row.block * block_size + np.arange(row.num_tokens) for row in rows]
    return EncoderBatch([row.num_tokens for row in rows], _Mover(device)(np.concatenate(slots)))


def _slots(row: EncodeRow, block_size: int) -> _Ints:
    positions = np.arange(len(row.tokens))
    return np.array(row.blocks, np.int64)[positions // block_size] * block_size + positions % block_size


def _draws(mirror: SequenceMirror, slots: _Ints, positions: _Ints) -> Draws:
    """The token drawn after `context` visible tokens stands at position `context`."""
    return Draws(
        temperature=mirror.temperature[slots],
        top_k=mirror.top_k[slots],
        top_p=mirror.top_p[slots],
        min_p=mirror.min_p[slots],
        seed=mirror.seed[slots],
        sample=mirror.sample[slots],
        position=positions,
    )


class _Mover:
    """Host arrays to the device; on CPU the tensor shares the array's memory."""

    __slots__ = ("_device", "_is_host")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_host = device.type == "cpu"

    def __call__(self, array: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._is_host else tensor.to(self._device, non_blocking=True)

"""From a step's plan and the rank's mirror to the tensors that the model reads. Host arithmetic in numpy.

Shapes: B sequences, T packed tokens, N positions whose logits are wanted: one of each row that draws, or, where a row
has drafts, the last one before them and all of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice

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
_ALIGNED = 16  # numbers: kernels are not compiled again for addresses of another kind


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
    groups = [_group(table, slots, context_lens, sequence_of, positions) for table in mirror.tables]
    extents = [table.extents[slots] for table in mirror.fixed_tables]
    fixed_tables = [
        table.rows[slots, : _width(lens, table)] for table, lens in zip(mirror.fixed_tables, extents, strict=True)
    ]
    moved = iter(
        to_device(
            [
                input_ids,
                positions,
                query_starts[1:][sampled] - 1 - later,
                query_starts[previous_at[:, 0]],
                previous_at[:, 1],
                sampled if order is None else order[sampled],
                *chain.from_iterable(groups),
                *fixed_tables,
                *extents,
            ],
            device,
        )
    )
    ids, places, logits_rows, previous_tokens, previous_rows, sampled_rows = islice(moved, 6)
    grown = tuple(GroupMetadata(next(moved), next(moved)) for _ in groups)
    fixed = list(islice(moved, len(fixed_tables)))
    attention = AttentionBatch(
        num_sequences=len(rows),
        num_decodes=num_decodes,
        query_lens=num_tokens.tolist(),
        query_starts=query_starts.tolist(),
        context_lens=context_lens.tolist(),
        positions=places,
        groups=grown,
        logits_rows=logits_rows,
        fixed=tuple(
            FixedGroupMetadata(table, lens.tolist(), next(moved)) for table, lens in zip(fixed, extents, strict=True)
        ),
        only_logits=not (read.prompts or read.pooled),
    )
    return StepBatch(
        input_ids=ids,
        attention=attention,
        previous_tokens=previous_tokens,
        previous_rows=previous_rows,
        sampled_rows=sampled_rows,
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
    table: BlockTableArray, slots: _Ints, context_lens: _Ints, sequence_of: _Ints, positions: _Ints
) -> tuple[_Ints, _Ints]:
    """Block table and slot mapping."""
    block_table = table.rows[slots, : _width(context_lens, table)]
    slot_mapping = block_table[sequence_of, positions // table.block_size] * table.block_size
    slot_mapping += positions % table.block_size
    return block_table, slot_mapping


def _width(lens: _Ints, table: BlockTableArray) -> int:
    """Blocks of the longest."""
    return -(-int(lens.max()) // table.block_size)


def build_encodes(rows: Sequence[EncodeRow], block_size: int, device: torch.device) -> tuple[Tensor, EncoderBatch]:
    """The packed encoder inputs [S] int64 of a plan that has some, and where their output goes."""
    lens = [len(row.tokens) for row in rows]
    input_ids = np.fromiter(chain.from_iterable(row.tokens for row in rows), np.int64, count=sum(lens))
    slots = np.concatenate([_slots(row, block_size) for row in rows])
    ids, slot_mapping = to_device([input_ids, slots], device)
    return ids, EncoderBatch(lens, slot_mapping)


def build_projections(rows: Sequence[Projection], block_size: int, device: torch.device) -> EncoderBatch:
    """Where the output lies that decoder layers make their keys and values of, and these go: a block is an input."""
    slots = [row.block * block_size + np.arange(row.num_tokens) for row in rows]
    (slot_mapping,) = to_device([np.concatenate(slots)], device)
    return EncoderBatch([row.num_tokens for row in rows], slot_mapping)


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


def to_device(arrays: Sequence[_Ints], device: torch.device) -> list[Tensor]:
    """The same numbers there. On a CPU the tensors share the arrays' memory; a GPU gets all in one copy, for which
    nobody waits: each copy takes a stream some microseconds, and one from memory that is not pinned may wait for it."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    starts = [0, *accumulate(-(-array.size // _ALIGNED) * _ALIGNED for array in arrays)]
    pinned = torch.empty(starts[-1], dtype=torch.int64, pin_memory=True)
    staged = pinned.numpy()
    for start, array in zip(starts, arrays, strict=False):
        staged[start : start + array.size].reshape(array.shape)[...] = array
    there = pinned.to(device, non_blocking=True)
    return [there[start : start + array.size].view(array.shape) for start, array in zip(starts, arrays, strict=False)]

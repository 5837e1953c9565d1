"""What a rank remembers of the sequences between steps: block tables and sampling parameters, in arrays by slot.

Arrays and not objects, so that a batch of any size is gathered by a few numpy calls. What few sequences ask for lies
in dicts, which are empty otherwise. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.request import SamplingParams
from workers.engine.beam_search import num_candidates
from workers.engine.constraint import ConstraintCompiler
from workers.engine.history import History
from workers.engine.prompt_readings import PromptReader
from workers.engine.step_plan import Literal, NewSequence, StepPlan

_Array = npt.NDArray[Any]
_FIRST_SLOTS = 64
_FIRST_BLOCKS = 16


class BlockTableArray:
    """Block tables of one group, one row per slot; what lies beyond a row's length is the null block."""

    __slots__ = ("block_size", "extents", "lengths", "rows")

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.extents = np.zeros(_FIRST_SLOTS, np.int64)  # tokens that a fixed group holds
        self.rows = np.zeros((_FIRST_SLOTS, _FIRST_BLOCKS), np.int64)
        self.lengths = np.zeros(_FIRST_SLOTS, np.int64)

    def append(self, slot: int, blocks: Sequence[int]) -> None:
        start = int(self.lengths[slot])
        end = start + len(blocks)
        if end > self.rows.shape[1]:
            self.rows = _widen(self.rows, (self.rows.shape[0], max(end, 2 * self.rows.shape[1])))
        self.rows[slot, start:end] = blocks
        self.lengths[slot] = end

    def clear(self, slot: int) -> None:
        self.rows[slot, : self.lengths[slot]] = 0
        self.lengths[slot] = 0

    def grow(self, num_slots: int) -> None:
        self.rows = _widen(self.rows, (num_slots, self.rows.shape[1]))
        self.lengths = _widen(self.lengths, (num_slots,))
        self.extents = _widen(self.extents, (num_slots,))


class SequenceMirror:
    """Follows the deltas of the plans. `tables[g]` and the other arrays are indexed by slot; read only for others.

    The last `num_fixed` groups do not grow.
    """

    def __init__(
        self,
        block_sizes: Sequence[int],
        eos_token_ids: frozenset[int],
        constraints: ConstraintCompiler | None = None,
        num_fixed: int = 0,
    ) -> None:
        tables = [BlockTableArray(size) for size in block_sizes]
        num_growing = len(tables) - num_fixed
        self.tables, self.fixed_tables = tables[:num_growing], tables[num_growing:]
        self.num_prompt = np.zeros(_FIRST_SLOTS, np.int64)
        self.min_tokens = np.zeros(_FIRST_SLOTS, np.int64)
        self.temperature = np.zeros(_FIRST_SLOTS, np.float32)
        self.top_k = np.zeros(_FIRST_SLOTS, np.int64)
        self.top_p = np.ones(_FIRST_SLOTS, np.float32)
        self.min_p = np.zeros(_FIRST_SLOTS, np.float32)
        self.seed = np.zeros(_FIRST_SLOTS, np.uint64)
        self.sample = np.zeros(_FIRST_SLOTS, np.int64)
        self.num_logprobs = np.zeros(_FIRST_SLOTS, np.int64)  # −1: off
        self.num_candidates = np.zeros(_FIRST_SLOTS, np.int64)  # of a search; 0: a token is drawn
        self.histories: dict[int, History] = {}  # by slot
        self.biases: dict[int, tuple[tuple[int, ...], tuple[float, ...]]] = {}  # by slot: token ids, what is added
        self.readers: dict[int, PromptReader] = {}  # by sequence id
        self._forced: dict[int, dict[int, int]] = {}  # slot -> position -> what stands there
        self._ending: dict[int, tuple[int, ...]] = {}  # slot -> tokens that end it, if min_tokens forbids them at first
        self._eos_token_ids = eos_token_ids
        self._constraints = constraints
        self._slots: dict[int, int] = {}
        self._free = list(range(_FIRST_SLOTS - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, id_: int) -> bool:
        return id_ in self._slots

    def apply(self, plan: StepPlan) -> None:
        """Everything of the plan but raises and copies, in the order that StepPlan names."""
        for id_ in plan.finished:
            slot = self._slots.pop(id_)
            self._clear(slot)
            self._ending.pop(slot, None)
            self.histories.pop(slot, None)
            self.biases.pop(slot, None)
            self._forced.pop(slot, None)
            self.readers.pop(id_, None)
            self._free.append(slot)
        for id_ in plan.preempted:
            self._clear(self._slots[id_])
        for new in plan.new:
            self._add(new)
        for resumed in plan.resumed:
            slot = self._slots[resumed.id]
            self._append(slot, resumed.block_tables)
            if slot in self.histories:
                self.histories[slot].extend(0, resumed.history)
        for row in plan.sequences:
            if row.appends:
                self._append(self._slots[row.id], row.appends)
        if self.histories:
            for row in plan.sequences:
                history = self.histories.get(self._slots[row.id])
                if history is not None:
                    assert isinstance(row.inputs, Literal), f"sequence {row.id}: its last token is not known here"
                    history.extend(row.start, row.inputs.tokens)

    def slots(self, ids: Iterable[int]) -> npt.NDArray[np.int64]:
        slots = self._slots
        return np.array([slots[id_] for id_ in ids], np.int64)

    def early_ends(
        self, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(index, token ids) of the draws that must not end their sequence yet."""
        if not self._ending:
            return ()
        early = np.flatnonzero(positions - self.num_prompt[slots] < self.min_tokens[slots])
        return tuple((int(i), self._ending[int(slots[i])]) for i in early if int(slots[i]) in self._ending)

    def forced(
        self, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(index, the one token id) of the draws that nothing is drawn for."""
        if not self._forced:
            return ()
        found = (
            (i, self._forced[slot].get(position))
            for i, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True))
            if slot in self._forced
        )
        return tuple((i, (token,)) for i, token in found if token is not None)

    def _add(self, new: NewSequence) -> None:
        extents = [extent for extent in new.extents if extent is not None]
        assert len(extents) == len(self.fixed_tables), f"sequence {new.id}: {new.extents}"
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._slots[new.id] = slot
        params = new.params
        self.num_prompt[slot] = new.num_prompt
        self.min_tokens[slot] = params.min_tokens
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.seed[slot] = params.seed
        self.sample[slot] = params.sample
        self.num_logprobs[slot] = -1 if params.num_logprobs is None else params.num_logprobs
        eos = frozenset() if params.ignore_eos else self._eos_token_ids
        ending = tuple(sorted({*params.stop_token_ids, *eos}))
        if params.min_tokens and ending:
            self._ending[slot] = ending
        self.num_candidates[slot] = num_candidates(params.num_beams, len(ending)) if params.beams is not None else 0
        for table, extent in zip(self.fixed_tables, extents, strict=True):
            table.extents[slot] = extent
        self._append(slot, new.block_tables)
        self._add_extras(slot, new, params)

    def _add_extras(self, slot: int, new: NewSequence, params: SamplingParams) -> None:
        if new.forced:
            self._forced[slot] = dict(new.forced)
        tokens: list[int] = []
        if params.needs_history:
            history = self.histories[slot] = History(params, new.num_prompt, self._constraints)
            history.extend(0, new.history)
            tokens = history.tokens
        if params.logit_bias:
            self.biases[slot] = (
                tuple(token for token, _ in params.logit_bias),
                tuple(value for _, value in params.logit_bias),
            )
        if params.num_prompt_logprobs is not None or params.pooling is not None:
            self.readers[new.id] = PromptReader(new.num_prompt, tokens, params.num_prompt_logprobs, params.pooling)

    def _append(self, slot: int, blocks: Sequence[Sequence[int]]) -> None:
        for table, more in zip((*self.tables, *self.fixed_tables), blocks, strict=True):
            table.append(slot, more)

    def _clear(self, slot: int) -> None:
        for table in (*self.tables, *self.fixed_tables):
            table.clear(slot)

    def _grow(self) -> None:
        old = len(self.num_prompt)
        size = 2 * old
        for table in (*self.tables, *self.fixed_tables):
            table.grow(size)
        for name in (
            "num_prompt",
            "min_tokens",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "seed",
            "sample",
            "num_logprobs",
            "num_candidates",
        ):
            setattr(self, name, _widen(getattr(self, name), (size,)))
        self._free.extend(range(size - 1, old - 1, -1))


def _widen(array: _Array, shape: tuple[int, ...]) -> _Array:
    """A larger copy, zeros elsewhere."""
    wide = np.zeros(shape, array.dtype)
    wide[tuple(slice(size) for size in array.shape)] = array
    return wide

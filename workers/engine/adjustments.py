"""What changes the logits of a step's rows before a token is picked, other than temperature and the limits.

In this order: penalties, bias, then what is forbidden. A prohibition that would leave its row no token at all is
lifted for that row and token, the strongest staying: a grammar's mask first, then the early ends that `min_tokens`
forbids, then bad words and repeated runs, all of one row at once. So a grammar wins over bad words and min_tokens (it
always allows a token), and a request whose bad words name the whole vocabulary still goes on. A token that the model
forces comes last, whatever it overrides.

Rows are independent of each other. Shapes: N drawing rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.engine.history import History
from workers.engine.penalties import PenalisedRow, Penalties
from workers.engine.sequence_mirror import SequenceMirror

_Ints = npt.NDArray[np.int64]
_WORD_BITS = 32


class Entries(NamedTuple):
    """Single logits: rows and token ids, host arrays of one length; an entry may be named twice."""

    rows: _Ints
    ids: _Ints

    @classmethod
    def of(cls, ids_by_row: Iterable[tuple[int, Sequence[int]]]) -> Entries:
        """Pairs of a row and the token ids in it."""
        pairs = list(ids_by_row)
        rows = np.array([row for row, _ in pairs], np.int64)
        ids = np.fromiter(chain.from_iterable(ids for _, ids in pairs), np.int64)
        return cls(np.repeat(rows, [len(ids) for _, ids in pairs]), ids)


class Bias(NamedTuple):
    entries: Entries
    values: npt.NDArray[np.float32]  # added; one per entry


class GrammarMask(NamedTuple):
    rows: _Ints  # [M], each once
    allowed: npt.NDArray[np.uint32]  # [M, ceil(V / 32)]: see Constraint.fill


@dataclass(frozen=True, slots=True)
class Adjustments:
    """None where no row asks for it."""

    penalties: Penalties | None = None
    bias: Bias | None = None
    grammar: GrammarMask | None = None
    early_ends: Entries | None = None
    bad_words: Entries | None = None  # and repeated runs
    forced: Entries | None = None  # one per row: nothing else may be drawn there

    def apply(self, logits: Tensor) -> Tensor:
        """Adjusted logits [N, V], from logits of any float dtype, which may be overwritten."""
        if logits.element_size() < 4:
            logits = logits.float()
        if self.penalties is not None:
            self.penalties.apply(logits)
        if self.bias is not None:
            rows, ids = self.bias.entries
            values = torch.from_numpy(self.bias.values).to(logits.device, logits.dtype)
            logits.index_put_((_tensor(rows, logits), _tensor(ids, logits)), values, accumulate=True)
        if self.grammar is not None:
            _mask(logits, self.grammar)
        for entries in (self.early_ends, self.bad_words):
            if entries is not None:
                _forbid(logits, entries)
        if self.forced is not None:
            rows, ids = (_tensor(each, logits) for each in self.forced)
            logits[rows] = -torch.inf
            logits[rows, ids] = 0.0
        return logits


def adjustments(
    mirror: SequenceMirror, slots: _Ints, positions: _Ints, vocab_size: int
) -> tuple[Adjustments | None, dict[int, str]]:
    """Of the rows that draw the tokens at `positions` [N] for the sequences in `slots` [N].

    And why rows have none: their grammars raised. Such a row must not be drawn; the others are not touched by it.
    """
    early_ends = mirror.early_ends(slots, positions)
    forced = mirror.forced(slots, positions)
    if not (mirror.histories or mirror.biases or early_ends or forced):
        return None, {}
    by_row = list(enumerate(slots.tolist()))
    histories = [(row, mirror.histories[slot]) for row, slot in by_row if slot in mirror.histories]
    biases = [(row, *mirror.biases[slot]) for row, slot in by_row if slot in mirror.biases]
    penalised = [
        PenalisedRow(row, history.params, history.counts)
        for row, history in histories
        if history.counts is not None and len(history.counts.ids)
    ]
    bad_words = Entries.of((row, history.forbidden()) for row, history in histories)
    grammar, failures = _grammar([each for each in histories if each[1].has_grammar], vocab_size)
    return Adjustments(
        penalties=Penalties.of(penalised) if penalised else None,
        bias=_bias(biases) if biases else None,
        grammar=grammar,
        early_ends=Entries.of(early_ends) if early_ends else None,
        bad_words=bad_words if len(bad_words.rows) else None,
        forced=Entries.of(forced) if forced else None,
    ), failures


def _bias(biases: list[tuple[int, tuple[int, ...], tuple[float, ...]]]) -> Bias:
    values = np.fromiter(chain.from_iterable(values for *_, values in biases), np.float32)
    return Bias(Entries.of((row, ids) for row, ids, _ in biases), values)


def _grammar(histories: list[tuple[int, History]], vocab_size: int) -> tuple[GrammarMask | None, dict[int, str]]:
    failures: dict[int, str] = {}
    if not histories:
        return None, failures
    allowed = np.zeros((len(histories), -(-vocab_size // _WORD_BITS)), np.uint32)
    for (row, history), mask in zip(histories, allowed, strict=True):
        try:
            history.fill(mask)
        except Exception as error:  # noqa: BLE001 - one request's grammar must not end the others' step
            failures[row] = f"grammar: {type(error).__name__}: {error}"
            mask[:] = ~np.uint32(0)
    return GrammarMask(np.array([row for row, _ in histories], np.int64), allowed), failures


def _mask(logits: Tensor, grammar: GrammarMask) -> None:
    words = torch.from_numpy(grammar.allowed.view(np.int32)).to(logits.device)
    bits = torch.arange(_WORD_BITS, dtype=torch.int32, device=logits.device)
    allowed = ((words[:, :, None] >> bits) & 1).bool().flatten(1)[:, : logits.shape[1]]
    rows = _tensor(grammar.rows, logits)
    logits[rows] = logits[rows].masked_fill_(~allowed, -torch.inf)


def _forbid(logits: Tensor, entries: Entries) -> None:
    """-inf at the entries of every row that keeps something else."""
    rows, ids = _tensor(entries.rows, logits), _tensor(entries.ids, logits)
    before = logits[rows, ids]
    logits[rows, ids] = -torch.inf
    among, inverse = np.unique(entries.rows, return_inverse=True)
    left = logits[_tensor(among, logits)].amax(dim=-1) != -torch.inf
    logits[rows, ids] = before.masked_fill_(left[_tensor(inverse, logits)], -torch.inf)


def _tensor(values: npt.NDArray[np.generic], like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)

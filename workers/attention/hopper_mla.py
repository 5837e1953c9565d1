"""Latent attention on SM90: single tokens by our latent decode kernel, prompts by FlashInfer's FA3 over expanded keys.

Prompts with cached tokens attend to their new tokens, then to the cached ones in pieces; the parts are merged by their
weights. No part is ever empty. Shapes as in `mla_interface`; n tokens of prompts, the last rows of T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from workers.attention.flashinfer_prefill import HeadShape, Ragged, workspace
from workers.attention.interface import AttentionBatch, KvCache
from workers.attention.mla_interface import LATENTS, MlaProblem
from workers.kernels.context_runs import ContextRuns, cut_contexts
from workers.kernels.latent_decode import latent_decode, programs_of
from workers.kernels.tactic_table import TacticTable


class CachedRun(NamedTuple):
    """Cached positions [start, end) of one sequence of the step, counted from its prompts."""

    sequence: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class CachedPiece:
    """Cached tokens that are expanded together."""

    rows: Tensor  # [C] int64: latent rows of layer 0 in pages seen as [blocks * layers * S, L + R]
    queries: Tensor  # [m] int64: rows of the n tokens that see them
    attention: Ragged


class HopperMla:
    """Made once per model and rank. One stream; plans' host buffers are reused when the device has read them."""

    def __init__(self, problem: MlaProblem) -> None:
        assert problem.nope_size is not None and problem.value_size is not None, "refused without"
        self.problem = problem
        self._shape = HeadShape(
            problem.num_heads,
            problem.num_heads,
            problem.nope_size + problem.rope_size,
            problem.value_size,
            problem.scale,
            problem.dtype,
        )
        self._attentions: list[Ragged] = []
        self._workspace: Tensor | None = None
        self._planned = torch.cuda.Event()

    @property
    def name(self) -> str:
        return "hopper"

    def begin(self, batch: AttentionBatch, group: int, cache: KvCache) -> HopperMlaStep:
        pages = cache.pages(LATENTS)
        new: Ragged | None = None
        pieces: list[CachedPiece] = []
        if batch.num_decodes < batch.num_sequences:
            self._planned.synchronize()
            first = batch.num_decodes
            query_lens = batch.query_lens[first:]
            new = self._attention(0, pages.device)
            new.plan(query_lens, query_lens, causal=True)
            cached = [c - q for c, q in zip(batch.context_lens[first:], query_lens, strict=True)]
            table = batch.groups[group].block_table[first:]
            for index, runs in enumerate(split_runs(cached, self.problem.max_piece_tokens), 1):
                pieces.append(self._piece(index, runs, query_lens, table, pages))
            self._planned.record()
        return HopperMlaStep(self.problem, batch, group, pages, new, pieces)

    def _attention(self, index: int, device: torch.device) -> Ragged:
        if self._workspace is None:
            self._workspace = workspace(device)
        while len(self._attentions) <= index:
            self._attentions.append(Ragged(self._shape, self._workspace))
        return self._attentions[index]

    def _piece(
        self, index: int, runs: Sequence[CachedRun], query_lens: Sequence[int], table: Tensor, pages: Tensor
    ) -> CachedPiece:
        num_layers, size = pages.shape[1:3]
        starts = [sum(query_lens[: run.sequence]) for run in runs]
        queries = [torch.arange(at, at + query_lens[run.sequence]) for at, run in zip(starts, runs, strict=True)]
        device = pages.device
        rows: list[Tensor] = []
        for run in runs:
            positions = torch.arange(run.start, run.end, device=device)
            rows.append(table[run.sequence][positions // size] * (num_layers * size) + positions % size)
        attention = self._attention(index, device)
        attention.plan([query_lens[run.sequence] for run in runs], [run.end - run.start for run in runs], causal=False)
        return CachedPiece(torch.cat(rows), torch.cat(queries).to(device, non_blocking=True), attention)


def split_runs(cached: Sequence[int], max_tokens: int) -> list[list[CachedRun]]:
    """Cached tokens of each sequence -> pieces of at most `max_tokens`, none empty, no run empty."""
    pieces: list[list[CachedRun]] = []
    room = 0
    for sequence, count in enumerate(cached):
        start = 0
        while start < count:
            if not room:
                pieces.append([])
                room = max_tokens
            end = min(count, start + room)
            pieces[-1].append(CachedRun(sequence, start, end))
            room -= end - start
            start = end
    return pieces


class HopperMlaStep:
    """One step of one group, all layers. Valid until the next `begin`; used by one thread."""

    def __init__(
        self,
        problem: MlaProblem,
        batch: AttentionBatch,
        group: int,
        pages: Tensor,
        new: Ragged | None,
        pieces: list[CachedPiece],
    ) -> None:
        self._problem = problem
        self.pages = pages  # [blocks, layers, S, L + R]
        self._table = batch.groups[group].block_table
        self.slots = batch.groups[group].slot_mapping
        self.positions = batch.positions
        self.num_decodes = batch.num_decodes
        self.new = new  # None: no prompt
        self.pieces = pieces
        self._cut: ContextRuns | None = None  # of all layers, made by the first

    def decode(self, layer: int, q: Tensor, q_rope: Tensor, tactics: TacticTable) -> Tensor:
        """q [A, H, L] in latent space, q_rope [A, H, R], A the single tokens -> [A, H, L]."""
        problem = self._problem
        if self._cut is None:
            tactic = tactics.latent_decode(
                len(q), problem.num_heads, problem.latent_size, problem.rope_size, block_size=problem.block_size
            )
            self._cut = cut_contexts(self.positions[: len(q)], programs_of(problem.num_heads), tactic)
        return latent_decode(q, q_rope, self.pages, self._table, layer, problem.scale, self._cut)

    def cached_rows(self, layer: int, piece: CachedPiece) -> Tensor:
        """[C, L + R]."""
        rows = self.pages.view(-1, self.pages.shape[-1])[layer * self._problem.block_size :]
        return rows.index_select(0, piece.rows)

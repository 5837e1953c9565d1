"""Latent attention with a sparse indexer on SM90.

Single tokens attend densely while all their contexts fit `index_topk`, else all of them choose. Prompts that fit are
those of `hopper_mla`; tokens of longer ones choose, each for itself. Choices of index_topk rows are attended by FA3,
planned once for a number of queries; smaller ones, and a few queries left over, by our own kernel. Lengths of single
tokens are read on the device, so that a CUDA graph of either form serves every step of that form.

Shapes as in `mla_interface`; P rows that choose, K = index_topk, S block size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from workers.attention.flashinfer_mla import ChosenRows
from workers.attention.flashinfer_prefill import workspace
from workers.attention.hopper_mla import HopperMla, HopperMlaStep
from workers.attention.index_keys import gather_pages
from workers.attention.index_tools import IndexTools, QuantizedQueries
from workers.attention.interface import AttentionBatch, GroupMetadata, KvCache
from workers.attention.mla_interface import INDEX_KEYS, LATENTS, MlaProblem
from workers.kernels.sparse_latents import sparse_latents
from workers.kernels.tactics import SHORT_ROWS, sparse_tactic

# Numbers of queries that FA3 has plans for: those of decode graphs, and more for prompts.
PLANNED = (*range(8, 129, 8), *range(144, 257, 16), 512, 1024)
MAX_SCORES = 1 << 27  # that exist at a time for a prompt: half a GB


class Rows(NamedTuple):
    """Rows [start, end) of T, or those `picked`."""

    start: int
    end: int
    picked: Tensor | None  # int64

    def take(self, x: Tensor) -> Tensor:
        return x[self.start : self.end] if self.picked is None else x.index_select(0, self.picked)

    def room(self, out: Tensor) -> Tensor:
        """Where these rows of `out` are written before `put`: in place, if they lie together."""
        return out[self.start : self.end] if self.picked is None else out.new_empty(len(self.picked), *out.shape[1:])

    def put(self, out: Tensor, part: Tensor) -> None:
        if self.picked is not None:
            out.index_copy_(0, self.picked, part)


class Singles(NamedTuple):
    """Single tokens that choose: the first rows of P."""

    num_rows: int
    blocks: Tensor  # int32 [B, M]
    pages: Tensor  # int32 [B, M]: rows of layer 0 in pages seen as [blocks * layers, …]
    lengths: Tensor  # int32 [B]
    schedule: Tensor | None


class SparsePrompt(NamedTuple):
    """A prompt whose tokens choose: rows [start, end) of P."""

    start: int
    end: int
    pages: Tensor  # int32 [1, M], as of `Singles`, of its context alone
    lengths: Tensor  # int32 [end - start]


class Piece(NamedTuple):
    """Rows [start, end) of P that are attended together."""

    start: int
    end: int
    plan: ChosenRows | None  # None: by our own kernel
    short: bool  # some may see fewer than K


class SparseRows(NamedTuple):
    rows: Rows  # of T
    positions: Tensor  # int64 [P]
    lengths: Tensor  # int32 [P]: what each sees
    singles: Singles | None
    prompts: list[SparsePrompt]
    pieces: list[Piece]


class HopperDsa:
    """See `HopperMla`."""

    def __init__(self, problem: MlaProblem, tools: IndexTools) -> None:
        assert problem.index_topk is not None, "refused without"
        self.problem = problem
        self._topk = problem.index_topk
        self._tools = tools
        self._mla = HopperMla(replace(problem, index_topk=None))
        self._plans: dict[int, ChosenRows] = {}  # by number of queries; empty before the first step that chooses

    @property
    def name(self) -> str:
        return "hopper"

    def begin(self, batch: AttentionBatch, group: int, cache: KvCache) -> HopperDsaStep:
        singles, topk = batch.num_decodes, self._topk
        contexts = batch.context_lens
        single_tokens_choose = max(contexts[:singles], default=0) > topk
        prompts = range(singles, batch.num_sequences)
        choosing = [sequence for sequence in prompts if contexts[sequence] > topk]
        fitting = [sequence for sequence in prompts if contexts[sequence] <= topk]
        device = batch.positions.device
        if choosing:
            part = _part(batch, group, [*range(singles), *fitting])
            dense, dense_prompts = self._mla.begin(part, 0, cache), _rows(batch, fitting, device)
        else:
            dense = self._mla.begin(batch, group, cache)
            dense_prompts = Rows(batch.query_starts[singles] if prompts else 0, batch.num_tokens, None)
        sparse = self._sparse(batch, group, cache, single_tokens_choose, choosing)
        dense_singles = 0 if single_tokens_choose else singles
        return HopperDsaStep(
            self.problem, self._tools, batch, group, cache, dense, dense_singles, dense_prompts, sparse
        )

    def _sparse(
        self, batch: AttentionBatch, group: int, cache: KvCache, single_tokens: bool, prompts: list[int]
    ) -> SparseRows | None:
        if not single_tokens and not prompts:
            return None
        num_layers, size = cache.pages(LATENTS).shape[1:3]
        blocks = batch.groups[group].block_table.to(torch.int32)
        pages = blocks * num_layers
        members = [*range(batch.num_decodes), *prompts] if single_tokens else prompts
        rows = _rows(batch, members, batch.positions.device)
        positions = rows.take(batch.positions)
        lengths = (positions + 1).to(torch.int32)
        singles = None
        if single_tokens:
            count = batch.num_decodes
            schedule = self._tools.scores.schedule(lengths[:count])
            singles = Singles(count, blocks[:count], pages[:count], lengths[:count], schedule)
        start = 0 if singles is None else singles.num_rows
        parts: list[SparsePrompt] = []
        for sequence in prompts:
            end = start + batch.query_lens[sequence]
            used = -(-batch.context_lens[sequence] // size)
            parts.append(SparsePrompt(start, end, pages[sequence : sequence + 1, :used], lengths[start:end]))
            start = end
        # What a graph replays is not known when it is captured: single tokens may always be short.
        pieces = self._pieces(0, parts[0].start if parts else len(positions), short=True)
        if parts:
            cached = min(batch.context_lens[sequence] - batch.query_lens[sequence] for sequence in prompts)
            pieces += self._pieces(parts[0].start, len(positions), short=cached + 1 < self._topk)
        return SparseRows(rows, positions, lengths, singles, parts, pieces)

    def _pieces(self, start: int, end: int, *, short: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while start < end:
            count = planned_queries(end - start)
            stop = start + (count or end - start)
            pieces.append(Piece(start, stop, self._plan(count) if count else None, short))
            start = stop
        return pieces

    def _plan(self, num_queries: int) -> ChosenRows:
        """All are made at once, so that no memory is taken later, when requests are served."""
        if not self._plans:
            space = workspace(torch.device("cuda", torch.cuda.current_device()))
            self._plans = {size: ChosenRows(self.problem, size, self._topk, space) for size in PLANNED}
        return self._plans[num_queries]


def planned_queries(count: int) -> int:
    """How many of `count` queries the next plan is for. 0: too few for one."""
    return max((size for size in PLANNED if size <= count), default=0)


def _rows(batch: AttentionBatch, sequences: list[int], device: torch.device) -> Rows:
    """Of whole sequences."""
    if not sequences:
        return Rows(0, 0, None)
    starts = batch.query_starts
    if sequences == list(range(sequences[0], sequences[-1] + 1)):
        return Rows(starts[sequences[0]], starts[sequences[-1] + 1], None)
    index = torch.cat([torch.arange(starts[sequence], starts[sequence + 1]) for sequence in sequences])
    return Rows(0, 0, index.to(device, non_blocking=True))


def _part(batch: AttentionBatch, group: int, sequences: list[int]) -> AttentionBatch:
    """Single tokens, all of them, and the prompts named, as a batch of their own; where its tokens go is not in it."""
    lens = [batch.query_lens[sequence] for sequence in sequences]
    table = batch.groups[group].block_table
    chosen = torch.tensor(sequences, dtype=torch.int64).to(table.device, non_blocking=True)
    metadata = GroupMetadata(table.index_select(0, chosen), batch.groups[group].slot_mapping)
    return replace(
        batch,
        num_sequences=len(sequences),
        query_lens=lens,
        query_starts=[0, *torch.tensor(lens).cumsum(0).tolist()],
        context_lens=[batch.context_lens[sequence] for sequence in sequences],
        groups=(metadata,),
    )


class HopperDsaStep:
    """One step of one group, all layers. Valid until the next `begin`; used by one thread."""

    def __init__(
        self,
        problem: MlaProblem,
        tools: IndexTools,
        batch: AttentionBatch,
        group: int,
        cache: KvCache,
        dense: HopperMlaStep,
        dense_singles: int,
        dense_prompts: Rows,
        sparse: SparseRows | None,
    ) -> None:
        self._problem = problem
        self._tools = tools
        self.pages = cache.pages(LATENTS)  # [blocks, layers, S, L + R]
        self._flat = self.pages.view(-1, self.pages.shape[-1])
        self.index_pages = cache.pages(INDEX_KEYS)  # uint8 [blocks, layers, S * (J + 4)]
        self.slots = batch.groups[group].slot_mapping
        self.positions = batch.positions
        self.dense = dense  # of what attends to whole contexts
        self.dense_singles = dense_singles  # first rows of T
        self.dense_prompts = dense_prompts
        self.sparse = sparse  # None: nothing chooses

    def choose(self, layer: int, queries: QuantizedQueries) -> Tensor:
        """int32 [P, K]: rows of layer 0 in the flat latents, -1 behind those of a row that sees fewer."""
        sparse, topk, tools = self.sparse, self._problem.index_topk, self._tools
        assert sparse is not None and topk is not None, "nothing chooses in this step"
        parts: list[Tensor] = []
        if (singles := sparse.singles) is not None:
            mine = queries.rows(0, singles.num_rows)
            scores = tools.scores.paged(
                mine, self.index_pages, layer, singles.blocks, singles.lengths, singles.schedule
            )
            parts.append(tools.choose(scores, singles.lengths, singles.pages, topk))
        for prompt in sparse.prompts:
            keys, scales = gather_pages(self.index_pages, prompt.pages[0] + layer, queries.values.shape[2])
            step = max(1, MAX_SCORES // len(keys))
            for start in range(prompt.start, prompt.end, step):
                end = min(start + step, prompt.end)
                lengths = prompt.lengths[start - prompt.start : end - prompt.start]
                scores = tools.scores.packed(queries.rows(start, end), keys, scales, lengths)
                parts.append(tools.choose(scores, lengths, prompt.pages, topk))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def attend(self, layer: int, q: Tensor, q_rope: Tensor, chosen: Tensor) -> Tensor:
        """q [P, H, L] in latent space, q_rope [P, H, R], chosen int32 [P, K] -> [P, H, L]."""
        assert self.sparse is not None, "nothing chooses in this step"
        scale, heads = self._problem.scale, self._problem.num_heads
        out = torch.empty(*q.shape, dtype=q.dtype, device=q.device)
        for start, end, plan, short in self.sparse.pieces:
            mine, rope, rows, seen = q[start:end], q_rope[start:end], chosen[start:end], out[start:end]
            lengths = self.sparse.lengths[start:end]
            if plan is None:
                tactic = sparse_tactic(end - start, heads)
                sparse_latents(mine, rope, self.pages, rows, lengths, layer, scale, tactic, seen)
                continue
            plan.attend(mine, rope, self._flat[layer * self._problem.block_size :], rows, seen)
            if short:
                sparse_latents(mine, rope, self.pages, rows, lengths, layer, scale, SHORT_ROWS, seen, only_short=True)
        return out

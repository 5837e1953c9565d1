"""Grouped-query attention on SM90: single tokens by our paged decode kernel, prompts by FlashInfer's FA3.

Shapes: T tokens of the step, B sequences, H query heads, K key/value heads, D head size, S block size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.attention.flashinfer_prefill import HeadShape, Paged, Ragged, workspace
from workers.attention.interface import AttentionBatch, AttentionProblem, KvCache
from workers.kernels.context_runs import ContextRuns, cut_contexts
from workers.kernels.norms import PendingNorm
from workers.kernels.paged_decode import paged_decode
from workers.kernels.rotary import RotationTable, rotate_heads
from workers.kernels.tactics import RUNS


class HopperGqa:
    """See `AttentionBackend`. One stream; a plan's host buffers are reused when the device has read them."""

    def __init__(self, problem: AttentionProblem) -> None:
        self.problem = problem
        self._shape = HeadShape(
            problem.num_heads, problem.num_kv_heads, problem.head_dim, problem.head_dim, problem.scale, problem.dtype
        )
        self._ragged: Ragged | None = None
        self._paged: Paged | None = None
        self._planned = torch.cuda.Event()

    @property
    def name(self) -> str:
        return "hopper"

    def begin(self, batch: AttentionBatch, group: int, cache: KvCache, region: str) -> HopperGqaStep:
        pages = cache.pages(region)
        prefill = self._plan(batch, group, pages) if batch.num_decodes < batch.num_sequences else None
        return HopperGqaStep(self.problem, batch, group, pages, prefill)

    def _plan(self, batch: AttentionBatch, group: int, pages: Tensor) -> Ragged | Paged:
        if self._ragged is None or self._paged is None:
            space = workspace(pages.device)
            self._ragged = Ragged(self._shape, space)
            self._paged = Paged(self._shape, self.problem.block_size, space)
        self._planned.synchronize()
        first = batch.num_decodes
        query_lens, context_lens = batch.query_lens[first:], batch.context_lens[first:]
        if query_lens == context_lens:
            self._ragged.plan(query_lens, query_lens, causal=True)
            plan = self._ragged
        else:
            table = batch.groups[group].block_table
            self._paged.plan(query_lens, context_lens, self._pages(table[first:], context_lens, pages.shape[1]))
            plan = self._paged
        self._planned.record()
        return plan

    def _pages(self, table: Tensor, context_lens: Sequence[int], num_layers: int) -> Tensor:
        """Rows of layer 0 in pages seen as [blocks * layers, ...], those of all contexts side by side."""
        counts = [-(-context // self.problem.block_size) for context in context_lens]
        parts = [table[row, :count] for row, count in enumerate(counts)]
        return (torch.cat(parts) * num_layers).to(torch.int32)


class HopperGqaStep:
    """See `AttentionStep`. `rotate_and_attend` is the fused way in."""

    def __init__(
        self,
        problem: AttentionProblem,
        batch: AttentionBatch,
        group: int,
        pages: Tensor,
        prefill: Ragged | Paged | None,
    ) -> None:
        self._problem = problem
        self._pages = pages  # [blocks, layers, 2, K, S, D]
        self._flat = pages.flatten(0, 1)
        self._table = batch.groups[group].block_table
        self.slots = batch.groups[group].slot_mapping
        self.positions = batch.positions
        self._ends = batch.query_starts[1:]
        self._num_decodes = batch.num_decodes
        self._prefill = prefill
        self._cut: ContextRuns | None = None  # of all layers, made by the first

    def rotate_and_attend(
        self,
        layer: int,
        qkv: Tensor,
        rotation: RotationTable,
        norms: tuple[Tensor, Tensor, float] | None,
        pending: PendingNorm | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """qkv [T, (H + 2 K) D] as projected, overwritten -> [T, H * D]; [N, H * D] of the rows that are `read` [N],
        if that is given. `norms`, `pending`: see `rotate_heads`."""
        heads, kv = self._problem.num_heads, self._problem.num_kv_heads
        rotate_heads(qkv, rotation, self.positions, norms, self._pages, self.slots, layer, heads, pending)
        q, k, v = qkv.unflatten(1, (heads + 2 * kv, -1)).split([heads, kv, kv], 1)
        return self._attend(layer, q, k, v) if read is None else self._attend_read(layer, q[read], read)

    def _attend_read(self, layer: int, q: Tensor, read: Tensor) -> Tensor:
        """q [N, H, D] of the rows [N], as single tokens: all they see is in the cache by now."""
        if not len(read):
            return q.flatten(1)
        ends = torch.tensor(self._ends, pin_memory=True).to(read.device, non_blocking=True)
        positions, tables = self.positions[read], self._table[torch.searchsorted(ends, read, right=True)]
        cut = cut_contexts(positions, self._problem.num_kv_heads, RUNS)
        return paged_decode(q, self._pages, tables, positions, layer, self._problem.scale, cut)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks, offsets = self.slots // self._problem.block_size, self.slots % self._problem.block_size
        keys, values = self._pages[:, layer].unbind(1)
        keys[blocks, :, offsets] = k
        values[blocks, :, offsets] = v
        return self._attend(layer, q, k, v)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        decodes = self._num_decodes
        if self._prefill is None:
            return self._decode(layer, q)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if decodes:
            out[:decodes] = self._decode(layer, q[:decodes]).view_as(out[:decodes])
        if isinstance(self._prefill, Ragged):
            self._prefill.attend(q[decodes:], k[decodes:], v[decodes:], out[decodes:])
        else:
            self._prefill.attend(q[decodes:], self._flat[layer:], out[decodes:])
        return out.flatten(1)

    def _decode(self, layer: int, q: Tensor) -> Tensor:
        if self._cut is None:
            self._cut = cut_contexts(self.positions[: len(q)], self._problem.num_kv_heads, RUNS)
        scale = self._problem.scale
        return paged_decode(q, self._pages, self._table, self.positions, layer, scale, self._cut)

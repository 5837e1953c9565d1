"""One rank of a shard: follows the plans, runs the model, draws the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from workers.attention.interface import AttentionBatch, KvCache
from workers.engine import sampler
from workers.engine.batch import build
from workers.engine.block_manager import BlockRaise
from workers.engine.sequence_mirror import SequenceMirror
from workers.engine.step_plan import BlockCopy, StepPlan, StepResult


class StepModel(Protocol):
    """What a rank needs of a model whose caches are bound (workers.models.model.CausalModel has it)."""

    def forward(self, input_ids: Tensor, batch: AttentionBatch, capture_layers: Sequence[int] = ()) -> Tensor:
        """[T] -> [T, d]; writes the KV of all T tokens."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, d] -> [N, V]."""
        ...


class GenerationTable(Protocol):
    """The generations of one group's blocks, which other processes read (kvtransfer.pool has it)."""

    def raise_to(self, blocks: Sequence[int], generations: Sequence[int]) -> None:
        """Entries become the larger of what they are and `generations`; `blocks` names none twice."""
        ...


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that was given to the device."""

    step: int
    tokens: Tensor  # [N] int64 on the device
    ids: list[int]  # [N]: whose they are

    def collect(self) -> StepResult:
        """Waits for the device."""
        return StepResult(tokens=dict(zip(self.ids, self.tokens.tolist(), strict=True)))


class ModelRunner:
    """Owns the mirror of the sequences. Engine thread only.

    caches, generation_tables, block_sizes: one per group. Generations are raised here before the first write into a
    reused block.
    """

    def __init__(
        self,
        model: StepModel,
        caches: Sequence[KvCache],
        generation_tables: Sequence[GenerationTable],
        block_sizes: Sequence[int],
        *,
        device: torch.device,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        assert len(caches) == len(generation_tables) == len(block_sizes), "one of each per group"
        self._model = model
        self._caches = list(caches)
        self._generation_tables = list(generation_tables)
        self._mirror = SequenceMirror(block_sizes, eos_token_ids)
        self._device = device
        self._previous = torch.zeros(0, dtype=torch.int64, device=device)  # by row of the previous plan

    @property
    def num_sequences(self) -> int:
        """Sequences that the rank remembers."""
        return len(self._mirror)

    def execute(self, plan: StepPlan) -> StepResult:
        """`launch`, then `collect`."""
        return self.launch(plan).collect()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Applies the plan and starts its step. A plan without rows is legal and runs no model.

        Whatever the model raises passes through; the rank has then applied the plan all the same, and goes on with
        the next one.
        """
        self._raise_generations(plan.raises)
        self._copy(plan.copies)
        self._mirror.apply(plan)
        previous, self._previous = (
            self._previous,
            torch.zeros(len(plan.sequences), dtype=torch.int64, device=self._device),
        )
        if not plan.sequences:
            return Launched(plan.step, self._previous, [])
        batch = build(plan, self._mirror, self._device)
        if len(batch.previous_rows):
            batch.input_ids[batch.previous_tokens] = previous[batch.previous_rows]
        hidden = self._model.forward(batch.input_ids, batch.attention)
        if not batch.sampled_ids:
            return Launched(plan.step, self._previous[:0], [])
        logits = self._model.logits(hidden[batch.attention.logits_rows])
        tokens = sampler.sample(logits, batch.draws)
        self._previous[batch.sampled_rows] = tokens
        return Launched(plan.step, tokens, batch.sampled_ids)

    def drain(self) -> None:
        """Waits until the device does nothing of ours any more: blocks of a failed step may then be reused."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _raise_generations(self, raises: Sequence[BlockRaise]) -> None:
        if not raises:
            return
        for group, table in enumerate(self._generation_tables):
            latest = {block: generation for g, block, generation in raises if g == group}  # they only rise
            if latest:
                table.raise_to(list(latest), list(latest.values()))

    def _copy(self, copies: Sequence[BlockCopy]) -> None:
        if not copies:
            return
        for group, cache in enumerate(self._caches):
            mine = [copy for copy in copies if copy.group == group]
            if mine:
                cache.copy_blocks([copy.source for copy in mine], [copy.destination for copy in mine])

"""One rank of a shard: follows the plans, runs the model, draws the tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from workers.attention.interface import AttentionBatch, EncoderBatch, KvCache
from workers.engine import sampler
from workers.engine.adjustments import adjustments
from workers.engine.batch import StepBatch, build, build_encodes, build_projections
from workers.engine.block_manager import BlockRaise
from workers.engine.candidates import Best, BestTokens, SearchingRows
from workers.engine.constraint import ConstraintCompiler
from workers.engine.encoder_stream import EncoderStream
from workers.engine.logprobs import DrawnRows, Logprobs, hidden_logprobs
from workers.engine.pooling import PooledRow, Pooler
from workers.engine.prompt_readings import PromptRow
from workers.engine.sequence_mirror import SequenceMirror
from workers.engine.step_plan import BlockCopy, EncodeRow, Projection, PromptLogprobs, StepPlan, StepResult

_Brought = TypeVar("_Brought", Logprobs, Best)
_NOT_NUMBERS = "the model's logits are not finite numbers; the checkpoint may need another dtype"


class StepModel(Protocol):
    """What a rank needs of a model whose caches are bound (workers.models.model.CausalModel has it)."""

    def forward(self, input_ids: Tensor, batch: AttentionBatch, capture_layers: Sequence[int] = ()) -> Tensor:
        """[T] -> [T, d], or [N, d] where the batch asks for no more; writes the KV of all T tokens."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, d] -> [N, V]."""
        ...


class EncoderModel(Protocol):
    """What a rank needs besides, of a model that reads encoder inputs (workers.models.encoder_decoder has it)."""

    def encode(self, input_ids: Tensor, batch: EncoderBatch) -> Tensor:
        """[S] -> the encoder's output [S, d]."""
        ...

    def keep(self, states: Tensor, batch: EncoderBatch) -> None:
        """Writes the output, or what decoder steps read of it, into the blocks that the batch names."""
        ...

    def project(self, batch: EncoderBatch) -> None:
        """Writes what decoder steps read of the output that is in these blocks beside it."""
        ...


class GenerationTable(Protocol):
    """The generations of one group's blocks, which other processes read (kvtransfer.pool has it)."""

    def raise_to(self, blocks: Sequence[int], generations: Sequence[int]) -> None:
        """Entries become the larger of what they are and `generations`; `blocks` names none twice."""
        ...


class PromptSlice(NamedTuple):
    """Logprobs of the prompt tokens of a sequence from index `first` on."""

    id: int
    first: int
    logprobs: Logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A step that was given to the device. Tensors are there."""

    step: int
    tokens: Tensor  # [N] int64
    is_valid: Tensor  # [N] bool
    ids: list[int]  # [N]: whose they are
    failures: Mapping[int, str]  # row of N -> why it was not to be drawn
    has_drafts: bool = False  # some ids have several of N, next to each other
    drawn_logprobs: Sequence[tuple[list[int], Logprobs]] = ()  # rows of N, and theirs
    candidates: BestTokens | None = None  # of searches
    prompts: Sequence[PromptSlice] = ()
    vectors: Mapping[int, Tensor] = field(default_factory=dict)  # sequence id -> [d] float32
    over: torch.cuda.Event | None = None  # of the whole step, tokens on the host included; None: it is over
    encoded: torch.cuda.Event | None = None  # of the encoder inputs that it reads besides

    def collect(self) -> StepResult:
        """Waits for the step, also if it drew nothing: what it wrote may be read by others from now on, and its blocks
        may be given to others. Waits for nothing that was given to the device later."""
        for event in (self.over, self.encoded):
            if event is not None:
                event.synchronize()
        ids = self.ids
        drawn = self.tokens.tolist()
        tokens = dict(zip(ids, drawn, strict=True))
        runs: dict[int, tuple[int, ...]] = {}
        if self.has_drafts:
            by_id = groupby(zip(ids, drawn, strict=True), itemgetter(0))
            runs = {id_: run for id_, group in by_id if len(run := tuple(token for _, token in group)) > 1}
        failed = {ids[row]: reason for row, reason in self.failures.items()}
        if not self.is_valid.all():
            invalid = (id_ for id_, is_valid in zip(ids, self.is_valid.tolist(), strict=True) if not is_valid)
            failed |= dict.fromkeys(invalid, _NOT_NUMBERS)
        logprobs = {
            ids[row]: entry
            for rows, drawn in self.drawn_logprobs
            for row, entry in zip(rows, drawn.collect(), strict=True)
        }
        prompts: dict[int, PromptLogprobs] = {}
        for prompt in self.prompts:
            entries = prompt.logprobs.collect()
            if any(math.isnan(entry.logprob) for entry in entries):
                failed[prompt.id] = _NOT_NUMBERS
            prompts[prompt.id] = PromptLogprobs(prompt.first, entries)
        vectors: dict[int, bytes] = {}
        for id_, vector in self.vectors.items():
            if not vector.isfinite().all():
                failed[id_] = "the hidden states of its prompt are not finite numbers"
            vectors[id_] = vector.cpu().numpy().astype("<f4").tobytes()
        candidates = {} if self.candidates is None else self.candidates.collect(ids)
        return StepResult(
            tokens=tokens,
            runs=runs,
            logprobs=logprobs,
            prompt_logprobs=prompts,
            candidates=candidates,
            vectors=vectors,
            failed=failed,
        )


class ModelRunner:
    """Owns the mirror of the sequences. Engine thread only.

    caches, generation_tables, block_sizes: one per group. Generations are raised here before the first write into a
    reused block. With an encoder the last group is the fixed one.
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
        constraints: ConstraintCompiler | None = None,
        encoder: EncoderModel | None = None,
        find_largest: sampler.FindLargest = sampler.find_largest,
    ) -> None:
        assert len(caches) == len(generation_tables) == len(block_sizes), "one of each per group"
        self._model = model
        self._caches = list(caches)
        self._generation_tables = list(generation_tables)
        self._mirror = SequenceMirror(block_sizes, eos_token_ids, constraints, num_fixed=encoder is not None)
        self._encoder = encoder
        self._encoder_stream = EncoderStream(device)
        self._block_sizes = list(block_sizes)
        self._pooler = Pooler()
        self._device = device
        self._find_largest = find_largest
        self._previous = torch.zeros(0, dtype=torch.int64, device=device)  # by row of the previous plan

    @property
    def num_sequences(self) -> int:
        """Sequences that the rank remembers."""
        return len(self._mirror)

    def execute(self, plan: StepPlan) -> StepResult:
        """`launch`, then `collect`."""
        return self.launch(plan).collect()

    def launch(self, plan: StepPlan) -> Launched:
        """Applies the plan and starts its step. A plan without rows is legal and runs no model.

        Whatever the model raises passes through; the rank has then applied the plan all the same, and goes on with
        the next one.
        """
        launched = self._launch(plan)
        if self._device.type != "cuda":
            return launched
        over = torch.cuda.Event()
        over.record()
        return replace(launched, over=over, encoded=self._encoder_stream.ready if plan.encodes else None)

    @torch.inference_mode()
    def _launch(self, plan: StepPlan) -> Launched:
        self._raise_generations(plan.raises)
        self._copy(plan.copies)
        self._mirror.apply(plan)
        self._pooler.forget(plan.finished)
        previous, self._previous = (
            self._previous,
            torch.zeros(len(plan.sequences), dtype=torch.int64, device=self._device),  # read behind failed steps, too
        )
        encoded: Mapping[int, Tensor] = {}
        if plan.encodes:
            with self._encoder_stream.beside():
                encoded = self._encode(plan.encodes)
        if plan.projections:
            self._project(plan.projections)
        if not plan.sequences:
            return replace(self._nothing_drawn(plan), vectors=encoded)
        batch = build(plan, self._mirror, self._device)
        if len(batch.previous_rows) == len(batch.input_ids):
            torch.index_select(previous, 0, batch.previous_rows, out=batch.input_ids)
        elif len(batch.previous_rows):
            batch.input_ids[batch.previous_tokens] = previous[batch.previous_rows]
        hidden = self._model.forward(batch.input_ids, batch.attention)
        launched = self._draw(plan, batch, hidden) if batch.sampled_ids else self._nothing_drawn(plan)
        if batch.readings.prompts or batch.readings.pooled or encoded:
            prompts = [self._prompt(row, hidden) for row in batch.readings.prompts]
            vectors = {**encoded, **self._vectors(self._pooler.pool(hidden, batch.readings.pooled))}
            launched = replace(launched, prompts=prompts, vectors=vectors)
        return launched

    def _encode(self, rows: Sequence[EncodeRow]) -> Mapping[int, Tensor]:
        """What is told of the outputs, by sequence id."""
        assert self._encoder is not None, f"sequences {[row.id for row in rows]}: no encoder here"
        ((group, block_size),) = {(row.group, self._block_sizes[row.group]) for row in rows}
        assert group == len(self._caches) - 1, f"group {group} is not the fixed one"
        input_ids, batch = build_encodes(rows, block_size, self._device)
        states = self._encoder.encode(input_ids, batch)
        self._encoder.keep(states, batch)
        spans = zip(rows, batch.starts, batch.lens, strict=True)
        pooled = [
            PooledRow(row.id, row.pooling, at, at + n, 0, True) for row, at, n in spans if row.pooling is not None
        ]
        return self._vectors(Pooler().pool(states, pooled))

    def _project(self, rows: Sequence[Projection]) -> None:
        assert self._encoder is not None
        (block_size,) = {self._block_sizes[row.group] for row in rows}
        self._encoder.project(build_projections(rows, block_size, self._device))

    def _vectors(self, vectors: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """To the host, with the step."""
        if self._device.type != "cuda":
            return vectors
        return {id_: _to_host(vector) for id_, vector in vectors.items()}

    def _draw(self, plan: StepPlan, batch: StepBatch, hidden: Tensor) -> Launched:
        rows = batch.attention.logits_rows
        # As many rows as draw are these: a model that has their logits already recognises what it returned.
        logits = self._model.logits(hidden if len(rows) == len(hidden) else hidden[rows])
        kept: list[DrawnRows] = []
        if (batch.num_logprobs >= 0).any():
            kept = DrawnRows.keep(logits, batch.num_logprobs.tolist())
        searching = SearchingRows.of(batch.num_candidates)
        if searching is not None:
            logits = searching.normalise(logits)
        adjusted, failures = adjustments(self._mirror, batch.sampled_slots, batch.draws.position, logits.shape[1])
        if adjusted is not None:
            logits = adjusted.apply(logits)
        tokens, is_valid = sampler.sample(logits, batch.draws, self._find_largest)
        self._previous[batch.sampled_rows] = tokens
        logprobs = [(rows.rows, self._bring(rows.of(tokens))) for rows in kept]
        candidates = None if searching is None else searching.best(logits, self._bring)
        if self._device.type == "cuda":
            tokens, is_valid = _to_host(tokens), _to_host(is_valid)
        return Launched(
            step=plan.step,
            tokens=tokens,
            is_valid=is_valid,
            ids=batch.sampled_ids,
            failures=failures,
            has_drafts=plan.num_drafts > 0,
            drawn_logprobs=logprobs,
            candidates=candidates,
        )

    def _nothing_drawn(self, plan: StepPlan) -> Launched:
        none = torch.zeros(0, dtype=torch.int64)  # on the host: nobody is to wait for the device to learn of nothing
        return Launched(step=plan.step, tokens=none, is_valid=none.bool(), ids=[], failures={})

    def _prompt(self, row: PromptRow, hidden: Tensor) -> PromptSlice:
        states = hidden[row.start : row.start + len(row.targets)]
        logprobs = hidden_logprobs(states, self._model.logits, row.targets, row.num_top)
        return PromptSlice(row.id, row.first, self._bring(logprobs))

    def _bring(self, logprobs: _Brought) -> _Brought:
        """To the host, with the step: whoever reads them later waits for no other one."""
        if self._device.type != "cuda":
            return logprobs
        return type(logprobs)(*(_to_host(each) for each in logprobs))

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


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory that the device fills when it comes to it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

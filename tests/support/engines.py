"""Whole engines for tests, over the tiny model or a loaded one: real scheduler, block manager, runner and sampler."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt
import torch

from cluster.config import EncoderOutput
from cluster.hashing import chain_root
from cluster.request import FinishReason, RequestKey, SamplingParams, TokenLogprobs
from kvtransfer.layout import KvGeometry, RankLayout
from kvtransfer.pool import KvPool
from tests.support.tiny_model import ROW, TinyModel
from workers.attention.interface import KvCache
from workers.attention.kv_views import kv_cache
from workers.engine.block_manager import BlockManager, GroupCapacity
from workers.engine.constraint import ConstraintCompiler
from workers.engine.engine import Engine
from workers.engine.model_runner import ModelRunner
from workers.engine.scheduler import Scheduler, SchedulerLimits
from workers.engine.sequence import NOTHING_FORCED, EncoderInput, ForcedTokens, Sequence
from workers.engine.step_plan import StepOutcome
from workers.models.encoder_decoder import EncoderDecoderModel
from workers.models.loader import LoadedModel
from workers.speculative.proposer import Proposer

BLOCK_SIZE = 4
CPU = torch.device("cpu")


class Generations:
    """A generation table without another process to read it."""

    def __init__(self, num_blocks: int) -> None:
        self.entries = [0] * num_blocks

    def raise_to(self, blocks: SequenceOf[int], generations: SequenceOf[int]) -> None:
        for block, generation in zip(blocks, generations, strict=True):
            self.entries[block] = max(self.entries[block], generation)


def limits(
    *,
    max_batched_tokens: int = 64,
    max_sequences: int = 16,
    max_model_len: int = 512,
    chunk_tokens: int = 64,
    max_encoder_tokens: int = 0,
) -> SchedulerLimits:
    return SchedulerLimits(
        max_batched_tokens=max_batched_tokens,
        max_sequences=max_sequences,
        max_model_len=max_model_len,
        prefill_reserve=0.5,
        chunk_tokens=chunk_tokens,
        max_encoder_tokens=max_encoder_tokens,
    )


def encoder_input(tokens: SequenceOf[int]) -> EncoderInput:
    return EncoderInput(tuple(tokens), chain_root(b"root" * 4, encoder_tokens=tokens))


class Driver:
    """Feeds an engine and keeps what came out of it. Nothing here decides anything."""

    def __init__(self, engine: Engine, scheduler: Scheduler, blocks: BlockManager) -> None:
        self.engine = engine
        self.scheduler = scheduler
        self.blocks = blocks
        self.outcomes: list[StepOutcome] = []
        self.num_added = 0

    def add(
        self,
        tokens: SequenceOf[int],
        *,
        max_tokens: int = 16,
        num_prompt: int | None = None,
        sample: int = 0,
        ignore_eos: bool = True,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        min_tokens: int = 0,
        stop_token_ids: tuple[int, ...] = (),
        stop_after_first: bool = False,
    ) -> Sequence:
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            sample=sample,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
        )
        return self.submit(tokens, params, num_prompt=num_prompt, stop_after_first=stop_after_first)

    def submit(
        self,
        tokens: SequenceOf[int],
        params: SamplingParams,
        *,
        num_prompt: int | None = None,
        stop_after_first: bool = False,
    ) -> Sequence:
        seq = self.sequence(tokens, params, num_prompt=num_prompt, stop_after_first=stop_after_first)
        self.scheduler.add(seq)
        return seq

    def sequence(
        self,
        tokens: SequenceOf[int],
        params: SamplingParams,
        *,
        num_prompt: int | None = None,
        stop_after_first: bool = False,
        encoder_tokens: SequenceOf[int] = (),
        forced: ForcedTokens = NOTHING_FORCED,
        encodes: bool = False,
    ) -> Sequence:
        """One that is not queued yet. With encoder tokens, of a model that reads some; `encodes`: does nothing else."""
        self.num_added += 1
        return Sequence(
            self.num_added,
            RequestKey(f"request-{self.num_added}", 0),
            list(tokens),
            len(tokens) if num_prompt is None else num_prompt,
            params,
            arrival=self.num_added,
            stop_after_first=stop_after_first,
            encoder_input=encoder_input(encoder_tokens) if encoder_tokens else None,
            forced=forced,
            only_encodes=encodes,
        )

    def step(self) -> StepOutcome | None:
        outcome = self.engine.step()
        if outcome is not None:
            self.outcomes.append(outcome)
        return outcome

    def run(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"still busy after {max_steps} steps: {self.scheduler.num_waiting} waiting")

    def emitted(self, seq: Sequence) -> list[int]:
        """As the outcomes said, which is what a client sees."""
        return [token.token for outcome in self.outcomes for token in outcome.tokens if token.seq is seq]

    def logprobs(self, seq: Sequence) -> list[TokenLogprobs | None]:
        """Of its emitted tokens."""
        return [token.logprobs for outcome in self.outcomes for token in outcome.tokens if token.seq is seq]

    def prompt_logprobs(self, seq: Sequence) -> dict[int, TokenLogprobs]:
        """By index of the prompt token; a recompute says the same again, up to rounding."""
        found: dict[int, TokenLogprobs] = {}
        for outcome in self.outcomes:
            for chunk in outcome.chunks:
                if chunk.seq is seq and chunk.prompt_logprobs is not None:
                    assert chunk.prompt_logprobs.first >= 1
                    for index, entry in enumerate(chunk.prompt_logprobs.entries, chunk.prompt_logprobs.first):
                        assert abs(found.setdefault(index, entry).logprob - entry.logprob) < 1e-3
        return found

    def vector(self, seq: Sequence) -> npt.NDArray[np.float32]:
        """Of a pooled sequence."""
        vectors = [each.vector for outcome in self.outcomes for each in outcome.vectors if each.seq is seq]
        assert len(vectors) == 1
        return np.frombuffer(vectors[0], "<f4")

    def finish(self, seq: Sequence) -> FinishReason | None:
        ends = [token.finish for outcome in self.outcomes for token in outcome.tokens if token.seq is seq]
        return ends[-1] if ends else None


class TinyEngine(Driver):
    def __init__(
        self,
        *,
        num_blocks: int = 256,
        scheduler_limits: SchedulerLimits | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
        constraints: ConstraintCompiler | None = None,
        proposer: Proposer | None = None,
    ) -> None:
        pages = torch.full((num_blocks + 1, 1, BLOCK_SIZE, ROW), torch.nan, dtype=torch.float64)
        pages[0] = 0.0  # what nobody wrote must not be read: NaN would spread; the null block pads
        self.cache = KvCache({"rows": pages})
        self.model = TinyModel(self.cache, block_size=BLOCK_SIZE)
        self.generations = Generations(num_blocks + 1)
        blocks = BlockManager([GroupCapacity("self", num_blocks, BLOCK_SIZE)])
        scheduler = Scheduler(
            blocks, scheduler_limits or limits(), b"root" * 4, eos_token_ids=eos_token_ids, proposer=proposer
        )
        self.runner = ModelRunner(
            self.model,
            [self.cache],
            [self.generations],
            [BLOCK_SIZE],
            device=CPU,
            eos_token_ids=eos_token_ids,
            constraints=constraints,
        )
        super().__init__(Engine(scheduler, self.runner), scheduler, blocks)


class LoadedEngine(Driver):
    """The way a worker puts one together, in process. A model serves one engine: its caches are bound here."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_blocks: int = 256,
        num_fixed_blocks: int | None = None,
        block_size: int = 16,
        scheduler_limits: SchedulerLimits | None = None,
        encoder_output: EncoderOutput = "cross_kv",
        proposer: Proposer | None = None,
    ) -> None:
        encoder = loaded.model if isinstance(loaded.model, EncoderDecoderModel) else None
        groups = (
            loaded.model.kv_groups(block_size) if encoder is None else encoder.kv_groups(block_size, encoder_output)
        )
        geometry = KvGeometry(groups, loaded.model.spec.rope_convention)
        counts = [num_blocks, *[num_fixed_blocks or num_blocks] * (len(groups) - 1)]
        self.pool = KvPool.allocate(geometry, RankLayout(0, 0, 1), counts)
        caches = [kv_cache(group, regions) for group, regions in zip(groups, self.pool.regions, strict=True)]
        loaded.model.bind_kv(caches)
        fixed = encoder is not None
        projected = encoder_output == "hidden_states"
        blocks = BlockManager(
            [
                GroupCapacity(group.name, count, block_size, fixed and index == 1, projected and index == 1)
                for index, (group, count) in enumerate(zip(groups, counts, strict=True))
            ]
        )
        eos_token_ids = frozenset(loaded.model.spec.eos_token_ids)
        scheduler = Scheduler(
            blocks, scheduler_limits or limits(), b"root" * 4, eos_token_ids=eos_token_ids, proposer=proposer
        )
        self.runner = ModelRunner(
            loaded.model,
            caches,
            self.pool.generations,
            [block_size] * len(groups),
            device=CPU,
            eos_token_ids=eos_token_ids,
            encoder=encoder,
        )
        super().__init__(Engine(scheduler, self.runner), scheduler, blocks)

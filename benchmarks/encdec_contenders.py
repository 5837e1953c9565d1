"""Who computes an encoder–decoder model: this engine, or transformers, each with random weights on one device."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.encdec_shapes import Shape, Workload
from benchmarks.report import progress
from cluster.hashing import chain_root
from cluster.request import RequestKey, SamplingParams
from kvtransfer.layout import KvGeometry, RankLayout
from kvtransfer.pool import KvPool
from workers.attention.environment import Environment
from workers.attention.interface import AttentionBatch, EncoderBatch, FixedGroupMetadata, GroupMetadata
from workers.attention.kv_views import kv_cache
from workers.attention.packed import PackedBackend, TorchKernels
from workers.engine.block_manager import BlockManager, GroupCapacity
from workers.engine.cuda_graph import GraphedModel, default_prompt_sizes, default_sizes
from workers.engine.model_runner import ModelRunner, StepModel
from workers.engine.overlap import OverlappedEngine
from workers.engine.sampler import FindLargest, find_largest
from workers.engine.scheduler import Scheduler, SchedulerLimits
from workers.engine.sequence import EncoderInput, Sequence
from workers.models.encoder_decoder import CROSS, EncoderDecoderModel
from workers.models.loader import load

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = b"benchmark".ljust(16)
BLOCK_SIZE = 64


class Contender(Protocol):
    """Each returns work that starts on the device and may not be over."""

    def encoder(self, sources: list[list[int]]) -> Callable[[], object]: ...

    def context(self, workload: Workload) -> Callable[[], object]: ...

    def hop(self, workload: Workload, num_tokens: int) -> None: ...


class Ours:
    """A model with its pool; every `hop` starts an engine of its own on it."""

    def __init__(self, shape: Shape, device: torch.device, *, max_sequences: int, longest: int) -> None:
        self._device, self._max_sequences = device, max_sequences
        on_gpu = device.type == "cuda"
        environment = Environment.probe(device, strict=on_gpu)
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "config.json").write_text(json.dumps(shape.config))
            dtype = "bfloat16" if on_gpu else "float32"
            model = load(name, load_format="dummy", dtype=dtype, device=device, environment=environment).model
        assert isinstance(model, EncoderDecoderModel)
        self._model = model
        groups = model.kv_groups(BLOCK_SIZE)
        self._widths = [-(-longest // BLOCK_SIZE)] * 2
        self._num_blocks = max_sequences * self._widths[0]
        geometry = KvGeometry(groups, model.spec.rope_convention)
        self._pool = KvPool.allocate(geometry, RankLayout(0), [self._num_blocks] * 2, device)
        self._caches = [kv_cache(group, regions) for group, regions in zip(groups, self._pool.regions, strict=True)]
        # What a GPU computes with, but for its kernels, is tried out elsewhere, too.
        packed = None if on_gpu else PackedBackend(model.attention_problem(BLOCK_SIZE), TorchKernels())
        progress(str(model.bind_kv(self._caches, environment, backend=packed)))
        self._steps: StepModel = model
        self._find_largest: FindLargest = find_largest
        if on_gpu:
            from workers.kernels.largest import largest

            self._find_largest = largest
            start = time.perf_counter()
            sizes = default_sizes(max_sequences)
            graphed = GraphedModel(
                model,
                sizes,
                self._widths[0],
                device,
                max_fixed_blocks=self._widths[1:],
                prompt_sizes=(prompt_sizes := default_prompt_sizes(8192)),
            )
            graphed.capture()
            self._steps = graphed
            progress(f"{shape.name}: {len(sizes) + len(prompt_sizes)} graphs in {time.perf_counter() - start:.1f} s")

    def encoder(self, sources: list[list[int]]) -> Callable[[], object]:
        ids, batch = self._inputs(sources)
        return lambda: self._model.encode(ids, batch)

    def context(self, workload: Workload) -> Callable[[], object]:
        ids, inputs = self._inputs(workload.sources)
        states = self._model.encode(ids, inputs)
        batch = self._prompts(workload)
        prompts = self._to_device([token for prompt in workload.prompts for token in prompt])

        @torch.inference_mode()
        def work() -> Tensor:
            self._model.keep(states, inputs)
            hidden = self._steps.forward(prompts, batch)
            return self._steps.logits(hidden[batch.logits_rows]).argmax(-1)

        return work

    def hop(self, workload: Workload, num_tokens: int) -> None:
        capacities = [
            GroupCapacity("self", self._num_blocks, BLOCK_SIZE),
            GroupCapacity(CROSS, self._num_blocks, BLOCK_SIZE, True),
        ]
        limits = SchedulerLimits(
            max_batched_tokens=8192,
            max_sequences=self._max_sequences,
            max_model_len=self._widths[0] * BLOCK_SIZE,
            prefill_reserve=0.0,
            chunk_tokens=8192,
            max_encoder_tokens=1 << 20,
        )
        scheduler = Scheduler(BlockManager(capacities, enable_prefix_cache=False), limits, ROOT)
        runner = ModelRunner(
            self._steps,
            self._caches,
            self._pool.generations,
            [BLOCK_SIZE] * 2,
            device=self._device,
            encoder=self._model,
            find_largest=self._find_largest,
        )
        engine = OverlappedEngine(scheduler, runner)
        sequences: list[Sequence] = []
        for i, tokens in enumerate(workload.sources):
            params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
            read = EncoderInput(tuple(tokens), chain_root(ROOT, encoder_tokens=tokens))
            sequences.append(Sequence(i, RequestKey(str(i), 0), [0], 1, params, arrival=i, encoder_input=read))
            scheduler.add(sequences[-1])
        while engine.has_work:
            outcome = engine.step()
            if outcome is not None and outcome.error is not None:
                raise outcome.error
        if any(len(seq.tokens) != 1 + num_tokens for seq in sequences):
            raise RuntimeError(f"{[len(seq.tokens) - 1 for seq in sequences]} tokens of {num_tokens} each were drawn")

    def _inputs(self, sources: list[list[int]]) -> tuple[Tensor, EncoderBatch]:
        lens = [len(tokens) for tokens in sources]
        table = self._table(len(sources), self._widths[1])
        slots = torch.cat([_slots(row, length) for row, length in zip(table, lens, strict=True)])
        ids = self._to_device([token for tokens in sources for token in tokens])
        return ids, EncoderBatch(lens, slots.to(self._device))

    def _prompts(self, workload: Workload) -> AttentionBatch:
        """A step of fresh decoder prompts."""
        lens = workload.prompt_lens
        table = self._table(len(lens), self._widths[0])
        slots = torch.cat([_slots(row, length) for row, length in zip(table, lens, strict=True)])
        starts = [sum(lens[:i]) for i in range(len(lens) + 1)]
        cross = self._table(len(lens), self._widths[1])
        return AttentionBatch(
            num_sequences=len(lens),
            num_decodes=0,
            query_lens=lens,
            query_starts=starts,
            context_lens=lens,
            positions=torch.cat([torch.arange(length) for length in lens]).to(self._device),
            groups=(GroupMetadata(table.to(self._device), slots.to(self._device)),),
            logits_rows=self._to_device(starts[1:]) - 1,
            fixed=(FixedGroupMetadata(cross.to(self._device), workload.source_lens),),
        )

    def _table(self, count: int, width: int) -> Tensor:
        return torch.arange(count * width).view(count, width) + 1

    def _to_device(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._device)


def _slots(blocks: Tensor, length: int) -> Tensor:
    at = torch.arange(length)
    return blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE


class Transformers:
    def __init__(self, shape: Shape, device: torch.device, cache: str | None = None) -> None:
        """`cache`: the implementation that `generate` uses, None for its default."""
        from transformers.models.bart.configuration_bart import BartConfig
        from transformers.models.bart.modeling_bart import BartForConditionalGeneration
        from transformers.models.t5.configuration_t5 import T5Config
        from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration

        self._device, self.cache = device, cache
        told: dict[str, Any] = {key: value for key, value in shape.config.items() if key != "architectures"}
        told |= {"eos_token_id": None, "forced_eos_token_id": None, "forced_bos_token_id": None}
        made: Any
        with torch.device(device):
            if shape.name == "t5-large":
                made = T5ForConditionalGeneration(T5Config(**told))
            else:
                made = BartForConditionalGeneration(BartConfig(**told))
        self._model = made.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
        self._start = int(str(shape.config["decoder_start_token_id"]))

    def encoder(self, sources: list[list[int]]) -> Callable[[], object]:
        ids, mask = self._padded(sources)
        encoder = self._model.get_encoder()

        @torch.inference_mode()
        def work() -> object:
            return encoder(input_ids=ids, attention_mask=mask)

        return work

    def context(self, workload: Workload) -> Callable[[], object]:
        ids, mask = self._padded(workload.sources)
        prompts, prompts_mask = self._padded(workload.prompts, left=True)
        with torch.inference_mode():
            states = self._model.get_encoder()(input_ids=ids, attention_mask=mask)

        @torch.inference_mode()
        def work() -> Tensor:
            out = self._model(
                encoder_outputs=states,
                attention_mask=mask,
                decoder_input_ids=prompts,
                decoder_attention_mask=prompts_mask,
                use_cache=True,
            )
            return out.logits[:, -1].argmax(-1)

        return work

    @torch.inference_mode()
    def hop(self, workload: Workload, num_tokens: int) -> None:
        ids, mask = self._padded(workload.sources)
        more: dict[str, Any] = {}
        if self.cache is not None:
            more = {"cache_implementation": self.cache, "disable_compile": True}
        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=num_tokens,
            decoder_start_token_id=self._start,
            **more,
        )

    def with_cache(self, cache: str) -> Transformers:
        other = object.__new__(Transformers)
        other._device, other._model, other._start, other.cache = self._device, self._model, self._start, cache
        return other

    def _padded(self, rows: list[list[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            own = slice(longest - len(row), None) if left else slice(len(row))
            ids[i, own] = torch.tensor(row)
            mask[i, own] = 1
        return ids.to(self._device), mask.to(self._device)

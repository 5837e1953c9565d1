"""The engine in process on one GPU: figures beside the best engine's on an H200 and beside what the card could do.

    python -m benchmarks.engine_gpu --shape v2-lite|v2-lite-fp8|qwen3-8b
                                    [--workload mixed256|batch1|prefill|decode|steps …]
                                    [--repeats 3] [--profile FOLDER] [--json FILE]

Dummy weights, in bf16 or in fp8 blocks, prefix cache off, at most 256 sequences and 8192 tokens a step, CUDA graphs for
decode steps, the next step prepared while one runs, greedy tokens. Experts are those of benchmarks/balanced_experts.py.
Prompts are random ids below 100,000 from random.Random(0), drawn in this order: 64 tokens to warm up, the 256 prompt
lengths and ids of mixed256, its 256 output lengths. Medians of --repeats runs after one to warm up.

mixed256: 256 requests, 100-1024 tokens in and out; output tokens / time.
batch1:   context 1024; (time of 321 tokens - time of 65) / 256, in ms.
prefill:  16 prompts of 8192, one token each; prompt tokens / time.
decode:   128 prompts of 2048; 128 * 128 / (time of 193 tokens each - time of 65).
steps:    medians of steps of single tokens over contexts as they are served, long ones among short ones; if asked for.

The bound counts bytes at the rate of a device copy, or FLOPs at that of a large product, both measured in the same run.
A shape in fp8 is held against the committed figures of the same shape in bf16.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from benchmarks.balanced_experts import BalancedExperts
from benchmarks.gpu_shapes import SHAPES, GpuShape
from benchmarks.report import Figure, Report, Setting, progress, publish
from cluster.request import RequestKey, SamplingParams
from kvtransfer.layout import KvGeometry, RankLayout
from kvtransfer.pool import KvPool
from workers.attention.environment import Environment
from workers.attention.interface import AttentionBatch
from workers.attention.kv_views import kv_cache
from workers.engine.block_manager import BlockManager, GroupCapacity
from workers.engine.cuda_graph import GraphedModel, default_sizes
from workers.engine.model_runner import ModelRunner
from workers.engine.overlap import OverlappedEngine
from workers.engine.scheduler import Scheduler, SchedulerLimits
from workers.engine.sequence import Sequence
from workers.kernels.largest import largest
from workers.layers.fused_mlp import FusedExperts
from workers.models.deepseek import DeepseekForCausalLM
from workers.models.grouped_query import GqaForCausalLM
from workers.models.loader import load

CUDA = torch.device("cuda")
ROOT = b"benchmark".ljust(16)
BLOCK_SIZE = 64
MAX_SEQUENCES = 256
MAX_TOKENS = 8192
MAX_MODEL_LEN = 8448
NUM_BLOCKS = 4800
WORKLOADS = ("mixed256", "batch1", "prefill", "decode")  # that the peer was measured at
# In steps of so many sequences of the run that such a workload ends with, 65 tokens from the prompt on.
_MEAN_CONTEXTS = {("batch1", 1): 1024 + 33, ("decode", 128): 2048 + 33}
STEPS = "steps"
LEAST_DISTINCT = 60  # of 64 experts, at 64 sequences or more; fewer and the figure is void


@dataclass(frozen=True, slots=True)
class Ceilings:
    bytes_per_s: float
    flops: float
    fp8_flops: float  # 0: not asked for

    @classmethod
    def measure(cls, *, in_fp8: bool = False) -> Ceilings:
        source = torch.randn(1 << 30, device=CUDA, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        a, b = (torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
        copied = 2 * source.nbytes / device_seconds(lambda: target.copy_(source))
        size = 2 * 8192**3
        return cls(copied, size / device_seconds(lambda: torch.mm(a, b)), size / _fp8_seconds(a, b) if in_fp8 else 0.0)


def _fp8_seconds(a: Tensor, b: Tensor) -> float:
    from workers.kernels.fp8_products import product
    from workers.kernels.fp8_rows import quantize_rows
    from workers.layers.block_fp8 import quantize_matrix

    rows, matrix = quantize_rows(a), quantize_matrix(b)
    return device_seconds(lambda: product(rows, *matrix))


def device_seconds(work: Callable[[], object], repeats: int = 10) -> float:
    """Median of single launches, after three to warm up."""
    for _ in range(3):
        work()
    times: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


class WatchedModel:
    """Passes through, and keeps the cache slots of the last large decode step."""

    def __init__(self, model: GraphedModel) -> None:
        self._model = model
        self.slots = torch.empty(0, dtype=torch.int64, device=CUDA)

    def forward(self, input_ids: Tensor, batch: AttentionBatch, capture_layers: SequenceOf[int] = ()) -> Tensor:
        if batch.num_decodes == batch.num_sequences >= 64:
            self.slots = batch.groups[0].slot_mapping
        return self._model.forward(input_ids, batch, capture_layers)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)


class GpuEngine:
    """A model with its pool; every `serve` starts an engine of its own on it."""

    def __init__(self, shape: GpuShape, *, graphs: bool = True) -> None:
        with tempfile.TemporaryDirectory() as name:
            shape.write(Path(name))
            environment = Environment.probe(CUDA, strict=True)
            loaded = load(name, load_format="dummy", device=CUDA, environment=environment)
            model = cast(GqaForCausalLM | DeepseekForCausalLM, loaded.model)
        groups = model.kv_groups(BLOCK_SIZE)
        geometry = KvGeometry(groups, model.spec.rope_convention)
        self.pool = KvPool.allocate(geometry, RankLayout(0, 0, 1), [NUM_BLOCKS], CUDA)
        self.caches = [kv_cache(group, regions) for group, regions in zip(groups, self.pool.regions, strict=True)]
        progress(str(model.bind_kv(self.caches, environment)))
        fused = model.fused
        assert fused is not None, "strict chose the fused backend"
        self.experts: list[BalancedExperts] = []
        for index, layer in enumerate(fused.layers):
            if isinstance(layer.mlp, FusedExperts):
                layer.mlp.choose = BalancedExperts(layer.mlp.spec, index)
                self.experts.append(layer.mlp.choose)
        sizes = default_sizes(MAX_SEQUENCES)
        graphed = GraphedModel(model, sizes, -(-MAX_MODEL_LEN // BLOCK_SIZE), CUDA)
        if graphs:
            start = time.perf_counter()
            graphed.capture()
            progress(f"{len(sizes)} graphs in {time.perf_counter() - start:.1f} s")
        self.model = WatchedModel(graphed)
        self.step_seconds: list[tuple[int, int, float]] = []

    def serve(self, prompts: list[list[int]], outputs: list[int]) -> float:
        """Seconds until all have all their tokens."""
        blocks = BlockManager([GroupCapacity("self", NUM_BLOCKS, BLOCK_SIZE)], enable_prefix_cache=False)
        limits = SchedulerLimits(
            max_batched_tokens=MAX_TOKENS,
            max_sequences=MAX_SEQUENCES,
            max_model_len=MAX_MODEL_LEN,
            prefill_reserve=0.0,
            chunk_tokens=MAX_TOKENS,
        )
        scheduler = Scheduler(blocks, limits, ROOT)
        runner = ModelRunner(
            self.model, self.caches, self.pool.generations, [BLOCK_SIZE], device=CUDA, find_largest=largest
        )
        engine = OverlappedEngine(scheduler, runner)
        for i, (prompt, num_new) in enumerate(zip(prompts, outputs, strict=True)):
            params = SamplingParams(max_tokens=num_new, ignore_eos=True)
            scheduler.add(Sequence(i, RequestKey(str(i), 0), list(prompt), len(prompt), params, arrival=i))
        self.step_seconds.clear()
        torch.cuda.synchronize()
        start = last = time.perf_counter()
        while engine.has_work:
            outcome = engine.step()
            if outcome is not None and outcome.error is not None:
                raise outcome.error
            now = time.perf_counter()
            self.step_seconds.append((engine.last_batch.num_sequences, engine.last_batch.num_tokens, now - last))
            last = now
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def decode_seconds(self, num_sequences: int) -> list[float]:
        """Of each step of that many single tokens in the last run."""
        return [seconds for count, tokens, seconds in self.step_seconds if count == tokens == num_sequences]

    def distinct_experts(self) -> list[int]:
        """Per sparse layer, in the last decode step of 64 sequences or more; empty: there was none."""
        return [layer.num_distinct(self.model.slots) for layer in self.experts] if len(self.model.slots) else []


@dataclass(frozen=True, slots=True)
class Prompts:
    warm: list[int]
    mixed: list[list[int]]
    mixed_outputs: list[int]

    @classmethod
    def draw(cls) -> Prompts:
        draw = random.Random(0)
        warm = ids(draw, 64)
        mixed = [ids(draw, draw.randint(100, 1024)) for _ in range(256)]
        return cls(warm, mixed, [draw.randint(100, 1024) for _ in range(256)])


def ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(100_000) for _ in range(count)]


def served_contexts() -> dict[str, list[int]]:
    draw = random.Random(5)
    documents = [draw.choice([200, 300, 500, 2000, 5000, 8000]) for _ in range(48)]
    return {
        "3 documents, 9 chats": [8000, 6500, 4500, *(draw.randint(100, 1000) for _ in range(9))],
        "48 of 200 to 8000": documents,
        "128 of 100 to 2000": [draw.randint(100, 2000) for _ in range(128)],
        "200 of 100 to 2000": [draw.randint(100, 2000) for _ in range(200)],
        "64 of 2048": [2048] * 64,
        "128 of 2048": [2048] * 128,
    }


def step_figures(engine: GpuEngine, shape: GpuShape, bytes_per_s: float) -> list[Figure]:
    draw, figures = random.Random(1), list[Figure]()
    for name, contexts in served_contexts().items():
        prompts = [ids(draw, length) for length in contexts]
        engine.serve(prompts, [130] * len(prompts))
        value = 1e3 * statistics.median(engine.decode_seconds(len(prompts)))
        bound = 1e3 * shape.decode_bytes(len(prompts), statistics.mean(contexts) + 65) / bytes_per_s
        figures.append(Figure(f"step of {name}", value, "ms", bound, less_is_better=True))
    return figures


def mean_step_ms(engine: GpuEngine, num_sequences: int) -> float:
    times = engine.decode_seconds(num_sequences)
    return 1e3 * statistics.mean(times) if times else 0.0


def measure(engine: GpuEngine, shape: GpuShape, workload: str, repeats: int, ceilings: Ceilings) -> list[Figure]:
    prompts, draw = Prompts.draw(), random.Random(1)
    rate, peer = ceilings.bytes_per_s, shape.peers[workload]
    prefill_seconds = partial(shape.prefill_seconds, flops=ceilings.flops, fp8_flops=ceilings.fp8_flops)
    if workload == "mixed256":
        count = sum(prompts.mixed_outputs)
        value = count / median(lambda: engine.serve(prompts.mixed, prompts.mixed_outputs), repeats)
        contexts = [
            (len(prompt), len(prompt) + output)
            for prompt, output in zip(prompts.mixed, prompts.mixed_outputs, strict=True)
        ]
        seconds = sum(prefill_seconds(start) * start for start, _ in contexts)
        for step in range(max(prompts.mixed_outputs)):
            live = [start + step for start, end in contexts if start + step < end]
            seconds += shape.decode_bytes(len(live), statistics.mean(live)) / rate
        unit, bound, less = "output tok/s", count / seconds, False
    elif workload == "batch1":
        prompt = [ids(draw, 1024)]
        longer = median(lambda: engine.serve(prompt, [321]), repeats)
        value = 1e3 * (longer - median(lambda: engine.serve(prompt, [65]), repeats)) / 256
        unit, bound, less = "ms per token", 1e3 * shape.decode_bytes(1, 1024 + 193) / rate, True
    elif workload == "prefill":
        many = [ids(draw, 8192) for _ in range(16)]
        value = 16 * 8192 / median(lambda: engine.serve(many, [1] * 16), repeats)
        unit, bound, less = "tok/s", 1 / prefill_seconds(8192), False
    else:
        many = [ids(draw, 2048) for _ in range(128)]
        longer = median(lambda: engine.serve(many, [193] * 128), repeats)
        value = 128 * 128 / (longer - median(lambda: engine.serve(many, [65] * 128), repeats))
        unit, bound, less = "tok/s", 128 * rate / shape.decode_bytes(128, 2048 + 129), False
    against = peer / value if less else value / peer
    note = f"{shape.other} {peer:g}, {against:.3f} × it"
    if distinct := engine.distinct_experts():
        note += f"; {min(distinct)}-{max(distinct)} distinct experts a layer"
        if min(distinct) < LEAST_DISTINCT:
            note += ", VOID"
    figures = [Figure(workload, value, unit, bound, less_is_better=less, note=note)]
    for size in (1, 128, 256):
        if (mean := mean_step_ms(engine, size)) > 0:
            context = _MEAN_CONTEXTS.get((workload, size))
            note = "" if context is None else f"{shape.decode_bytes(size, context) / 1e9:.2f} GB"
            figures.append(Figure(f"{workload}: step of {size}", mean, "ms", note=note))
    return figures


def median(work: Callable[[], float], repeats: int) -> float:
    """After one run to warm up."""
    work()
    return statistics.median(work() for _ in range(repeats))


def profile(engine: GpuEngine, folder: Path, name: str) -> None:
    """Kernels of a few decode steps at 1 and 128 sequences and of one prompt, by time on the device."""
    draw = random.Random(2)
    cases = {"decode1": ([ids(draw, 1024)], [12]), "decode128": ([ids(draw, 2048) for _ in range(128)], [12] * 128)}
    cases["prefill"] = ([ids(draw, 8192)], [1])
    for case, (prompts, outputs) in cases.items():
        engine.serve(prompts, outputs)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            engine.serve(prompts, outputs)
        table = recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=80)
        with (folder / f"{name}-kernels.txt").open("a") as file:
            file.write(f"{case}\n{table}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--workload", choices=(*WORKLOADS, STEPS), nargs="+", default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", type=Path, help="folder for tables of kernels")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape, ceilings = SHAPES[arguments.shape], Ceilings.measure(in_fp8=SHAPES[arguments.shape].in_fp8)
    engine = GpuEngine(shape)
    engine.serve([Prompts.draw().warm], [8])
    figures = [
        Figure("device copy", ceilings.bytes_per_s / 1e12, "TB/s", note="bytes read and written"),
        Figure("product", ceilings.flops / 1e12, "TFLOP/s", note="bf16, 8192 cubed"),
    ]
    told = {"shape": shape.name, "workload": arguments.workload, "repeats": arguments.repeats}
    if shape.in_fp8:
        figures.append(Figure("fp8 product", ceilings.fp8_flops / 1e12, "TFLOP/s", note="DeepGEMM, 8192 cubed"))
    what = f"{shape.name}{'' if shape.in_fp8 else ' in bf16'} on {torch.cuda.get_device_name()}"
    report = Report("engine_gpu", what, told, figures, Setting.here(), {"gpu": torch.cuda.get_device_name()})
    for workload in arguments.workload:
        if workload == STEPS:
            measured = step_figures(engine, shape, ceilings.bytes_per_s)
        else:
            measured = measure(engine, shape, workload, arguments.repeats, ceilings)
        figures += measured
        for figure in measured:
            progress(f"{figure.name}: {figure.value:.4g} {figure.unit}")
        if arguments.json is not None:
            report.write(arguments.json)  # who stops the rest keeps this
    publish(report, arguments.json)
    if arguments.profile is not None:
        profile(engine, arguments.profile, shape.name)


if __name__ == "__main__":
    main()

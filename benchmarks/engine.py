"""The engine in process: what deciding costs per step, and output tokens per second against transformers.

    python -m benchmarks.engine [--threads 2] [--repeats 2] [--batch-sizes 4 8 16 32] [--clock wall|cpu]
                                [--only overhead|throughput|jitter] [--steps 200] [--json FILE]

overhead: scheduling, batch building and settling of 64 decoding sequences, without a model; best mean of several runs.
throughput: 32 requests, prompts uniform 16-256, outputs uniform 16-128 (seed 0), on a 100 M Llama shape in fp32 with
random weights; every request runs to its wanted length. transformers generates them in batches, sorted by prompt
length or by output length, at every batch size; each batch runs to its longest output, and only wanted tokens count.
output tokens/s = sum(outputs) / time. The greedy tokens of both are compared.
The bound is what the machine could do: per step the larger of FLOPs at the rate of a large matmul and weight bytes at
the rate of reading memory, both measured in the same run.
jitter: see benchmarks/jitter.py.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks import jitter
from benchmarks.report import Figure, Report, Setting, progress, publish
from cluster.request import RequestKey, SamplingParams
from kvtransfer.layout import KvGeometry, RankLayout
from kvtransfer.pool import KvPool
from workers.attention.interface import AttentionBatch
from workers.attention.kv_views import kv_cache
from workers.engine.batch import build
from workers.engine.block_manager import BlockManager, GroupCapacity
from workers.engine.engine import Engine
from workers.engine.model_runner import ModelRunner
from workers.engine.scheduler import Scheduler, SchedulerLimits
from workers.engine.sequence import Sequence
from workers.engine.sequence_mirror import SequenceMirror
from workers.engine.step_plan import StepResult
from workers.models.loader import load
from workers.speculative.proposer import Proposer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = b"benchmark".ljust(16)
CPU = torch.device("cpu")
BLOCK_SIZE = 64
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
BATCH_SIZES = (4, 8, 16, 32)
PARTS = ("overhead", "throughput", "jitter")
SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True, slots=True)
class Workload:
    prompts: list[list[int]]
    outputs: list[int]

    @classmethod
    def draw(cls, count: int = 32, seed: int = 0) -> Workload:
        draw = random.Random(seed)
        lengths = [draw.randint(16, 256) for _ in range(count)]
        prompts = [[draw.randrange(SHAPE["vocab_size"]) for _ in range(length)] for length in lengths]
        return cls(prompts, [draw.randint(16, 128) for _ in range(count)])

    @property
    def num_output_tokens(self) -> int:
        return sum(self.outputs)


@dataclass(frozen=True, slots=True)
class Machine:
    """What the cores do at best."""

    flops: float
    bytes_per_s: float

    @classmethod
    def measure(cls, stopwatch: Stopwatch) -> Machine:
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        memory = torch.ones(64 << 20)  # 256 MB, past every cache
        return cls(
            flops=2 * 1024**3 / stopwatch.best(lambda: torch.mm(a, b), 8),
            bytes_per_s=memory.nbytes / stopwatch.best(memory.sum, 8),
        )

    def seconds(self, flops: float, num_bytes: float) -> float:
        return max(flops / self.flops, num_bytes / self.bytes_per_s)


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """`clock` gives wall seconds, or those of this process's threads where others share the cores."""

    clock: Callable[[], float]
    repeats: int

    def best(self, work: Callable[[], object], repeats: int | None = None) -> float:
        """Seconds of the fastest of several runs."""
        times = []
        for _ in range(repeats or self.repeats):
            start = self.clock()
            work()
            times.append(self.clock() - start)
        return min(times)


# ---------------------------------------------------------------- deciding


def overhead(num_sequences: int = 64, num_steps: int = 200, repeats: int = 5) -> list[Figure]:
    """Best mean per step of schedule, mirror + build, settle."""
    runs = [_overhead_once(num_sequences, num_steps) for _ in range(repeats)]
    schedule, batch, settle = (min(run[i] for run in runs) * 1e3 for i in range(3))
    total = min(sum(run[:2]) for run in runs) * 1e3
    return [
        Figure("schedule", schedule, "ms/step", note=f"{num_sequences} decoding sequences"),
        Figure("mirror and batch", batch, "ms/step", 0.5, less_is_better=True, note="bound: the target"),
        Figure("schedule, mirror and batch", total, "ms/step", 1.0, less_is_better=True, note="bound: the target"),
        Figure("settle", settle, "ms/step"),
    ]


def _overhead_once(num_sequences: int, num_steps: int) -> tuple[float, float, float]:
    prompt, num_blocks = 1000, num_sequences * 32
    scheduler = Scheduler(
        BlockManager([GroupCapacity("self", num_blocks, BLOCK_SIZE)]),
        SchedulerLimits(
            max_batched_tokens=num_sequences * prompt,
            max_sequences=num_sequences,
            max_model_len=2048,
            prefill_reserve=0.1,
            chunk_tokens=prompt,
        ),
        ROOT,
    )
    mirror = SequenceMirror([BLOCK_SIZE], frozenset())
    for i in range(num_sequences):
        tokens = [(i * prompt + t) % 30_000 for t in range(prompt)]
        params = SamplingParams(max_tokens=1000, ignore_eos=True)
        scheduler.add(Sequence(i, RequestKey(str(i), 0), tokens, prompt, params, arrival=i))
    spent = [0.0, 0.0, 0.0]
    for step in range(num_steps + 1):
        start = time.perf_counter()
        plan = scheduler.schedule()
        scheduled = time.perf_counter()
        mirror.apply(plan)
        batch = build(plan, mirror, CPU)
        built = time.perf_counter()
        sampled = StepResult(tokens=dict.fromkeys(batch.sampled_ids, 7))
        settling = time.perf_counter()
        scheduler.settle(plan, sampled)
        settled = time.perf_counter()
        if step:  # the first one prefills
            spent = [spent[0] + scheduled - start, spent[1] + built - scheduled, spent[2] + settled - settling]
    return spent[0] / num_steps, spent[1] / num_steps, spent[2] / num_steps


# ---------------------------------------------------------------- against transformers


def make_checkpoint(folder: Path, gain: float = 4.0) -> None:
    """Matrices with std gain / sqrt(inputs) and embeddings 0.1: with a small gain texts end in loops, as with the
    default init they repeat one token for ever."""
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **cast(Any, SHAPE), tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            std = 0.1 if "embed" in name else gain / weight.shape[1] ** 0.5
            torch.nn.init.normal_(weight, std=std)
    model.save_pretrained(folder)


def run_transformers(
    folder: Path, workload: Workload, batch_sizes: list[int], stopwatch: Stopwatch
) -> tuple[dict[str, float], list[list[int]]]:
    """Seconds by "batch size, order", and the tokens of the last run."""
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    model = cast(Any, LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()
    indices = range(len(workload.prompts))
    orders = {
        "by prompt length": sorted(indices, key=lambda i: len(workload.prompts[i])),
        "by output length": sorted(indices, key=workload.outputs.__getitem__),
    }
    tokens: list[list[int]] = [[] for _ in indices]

    def generate(order: list[int], batch_size: int) -> None:
        for at in range(0, len(order), batch_size):
            members = order[at : at + batch_size]
            longest = max(len(workload.prompts[i]) for i in members)
            ids = torch.zeros(len(members), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(members):
                ids[row, longest - len(workload.prompts[i]) :] = torch.tensor(workload.prompts[i])
                mask[row, longest - len(workload.prompts[i]) :] = 1
            num_new = max(workload.outputs[i] for i in members)
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=num_new, pad_token_id=0
                )
            for row, i in enumerate(members):
                tokens[i] = out[row, longest : longest + workload.outputs[i]].tolist()

    seconds: dict[str, float] = {}
    for name, order in orders.items():
        for batch_size in batch_sizes:
            key = f"batches of {batch_size}, {name}"
            seconds[key] = stopwatch.best(lambda o=order, b=batch_size: generate(o, b))
            progress(f"transformers, {key}: {seconds[key]:.1f} s")
    return seconds, tokens


class CountingModel:
    """Passes through, and keeps the sizes of the steps."""

    def __init__(self, folder: Path) -> None:
        self.model = load(folder).model
        self.steps: list[tuple[int, int]] = []  # tokens, rows with logits

    def forward(self, input_ids: Tensor, batch: AttentionBatch, capture_layers: SequenceOf[int] = ()) -> Tensor:
        self.steps.append((len(input_ids), len(batch.logits_rows)))
        return self.model.forward(input_ids, batch, capture_layers)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)


def run_engine(
    folder: Path, workload: Workload, stopwatch: Stopwatch, proposer: Proposer | None = None
) -> tuple[float, list[list[int]], list[tuple[int, int]]]:
    """Seconds, tokens, sizes of the steps. The prefix cache is off: every run computes everything."""
    counting = CountingModel(folder)
    groups = counting.model.kv_groups(BLOCK_SIZE)
    geometry = KvGeometry(groups, counting.model.spec.rope_convention)
    num_blocks = sum(-(-(len(p) + o) // BLOCK_SIZE) for p, o in zip(workload.prompts, workload.outputs, strict=True))
    pool = KvPool.allocate(geometry, RankLayout(0, 0, 1), [num_blocks])
    caches = [kv_cache(group, regions) for group, regions in zip(groups, pool.regions, strict=True)]
    counting.model.bind_kv(caches)
    results: list[Sequence] = []

    def serve() -> None:
        counting.steps.clear()
        blocks = BlockManager([GroupCapacity("self", num_blocks, BLOCK_SIZE)], enable_prefix_cache=False)
        limits = SchedulerLimits(
            max_batched_tokens=512, max_sequences=32, max_model_len=2048, prefill_reserve=0.0, chunk_tokens=256
        )
        scheduler = Scheduler(blocks, limits, ROOT, proposer=proposer)
        runner = ModelRunner(counting, caches, pool.generations, [BLOCK_SIZE], device=CPU)
        engine = Engine(scheduler, runner)
        results[:] = [
            Sequence(
                i,
                RequestKey(str(i), 0),
                list(prompt),
                len(prompt),
                SamplingParams(max_tokens=num_new, ignore_eos=True),
                arrival=i,
            )
            for i, (prompt, num_new) in enumerate(zip(workload.prompts, workload.outputs, strict=True))
        ]
        for seq in results:
            scheduler.add(seq)
        while engine.has_work:
            engine.step()

    seconds = stopwatch.best(serve)
    progress(f"sluice: {seconds:.1f} s")
    return seconds, [seq.tokens[seq.num_prompt :] for seq in results], list(counting.steps)


def bound_seconds(machine: Machine, steps: list[tuple[int, int]]) -> float:
    d, inner, heads, kv = (
        SHAPE[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    layer = 2 * d * d + 2 * d * (d * kv // heads) + 3 * d * inner
    layers, head = layer * SHAPE["num_hidden_layers"], d * SHAPE["vocab_size"]
    return sum(machine.seconds(2 * (t * layers + n * head), 4 * (layers + head * bool(n))) for t, n in steps)


def throughput(batch_sizes: list[int], stopwatch: Stopwatch, num_requests: int = 32) -> list[Figure]:
    workload = Workload.draw(num_requests)
    machine = Machine.measure(stopwatch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder)
        ours, our_tokens, steps = run_engine(folder, workload, stopwatch)
        theirs, their_tokens = run_transformers(folder, workload, batch_sizes, stopwatch)
        again, _, _ = run_engine(folder, workload, stopwatch)
    ours = min(ours, again)
    count = workload.num_output_tokens
    bound = count / bound_seconds(machine, steps)
    equal = sum(a == b for a, b in zip(our_tokens, their_tokens, strict=True))
    different = len({token for tokens in our_tokens for token in tokens})
    best_of = {order: min((s, key) for key, s in theirs.items() if order in key) for order in ("prompt", "output")}
    notes = f"{equal} of {len(our_tokens)} requests token for token as transformers, {different} different tokens"
    figures = [
        Figure("matmul", machine.flops / 1e9, "GFLOPS", note="fp32, 1024 cubed"),
        Figure("memory read", machine.bytes_per_s / 1e9, "GB/s", note="256 MB sum"),
        Figure("sluice", count / ours, "output tok/s", bound, note=notes),
    ]
    figures += [Figure("transformers", count / s, "output tok/s", bound, note=key) for key, s in theirs.items()]
    for order, (seconds, key) in best_of.items():
        figures.append(Figure(f"sluice / transformers by {order} length", seconds / ours, "x", note=f"its best: {key}"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES), help="of transformers")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on shared cores, with --threads 1")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--steps", type=int, default=jitter.Load().num_steps, help="of jitter")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting, figures = Setting.here(), list[Figure]()
    wanted = [arguments.only] if arguments.only else list(PARTS)
    if "overhead" in wanted:
        figures += overhead()
    if "throughput" in wanted:
        figures += throughput(arguments.batch_sizes, Stopwatch(CLOCKS[arguments.clock], arguments.repeats))
    details: dict[str, object] = {}
    if "jitter" in wanted:
        measured = jitter.measure(jitter.Load(num_steps=arguments.steps))
        figures += jitter.figures(measured)
        details["jitter"] = jitter.details(measured)
    told = {name: getattr(arguments, name) for name in ("threads", "repeats", "batch_sizes", "clock", "steps")}
    report = Report("engine", f"{', '.join(wanted)} on CPU", told, figures, setting, details)
    publish(report, arguments.json)


if __name__ == "__main__":
    main()

"""An encoder–decoder model in one engine against transformers, and what its encoder's output weighs on the way.

    python -m benchmarks.encdec [--threads 2] [--repeats 2] [--requests 32] [--batch-sizes 8 32]
                                [--clock wall|cpu] [--json FILE]

32 requests on a T5-small shape, fp32, random weights: inputs uniform 16-256, outputs uniform 16-64 (seed 0); every
request runs to its wanted length. transformers generates them in batches, sorted by input length; each batch runs to
its longest output, and only wanted tokens count. Random weights of this size are chaotic: sums in another order bring
other texts, after some tokens. What transformers thinks of each token of ours is told as well.

The output of the encoder travels as the keys and values that decoder layers read (see docs/decisions/0010): their bytes
for a request beside those of hidden states, and the rate of a link above which they are there earlier than what this
machine would compute of hidden states.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.engine import CLOCKS, Stopwatch
from benchmarks.lone_engine import lone_engine
from benchmarks.report import Figure, Report, Setting, progress, publish
from cluster import config_file
from cluster.config import SluiceConfig
from cluster.hashing import chain_root
from cluster.request import RequestKey, SamplingParams
from workers.engine.sequence import EncoderInput, Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")

BLOCK_SIZE = 64
SHAPE = {"vocab_size": 32_128, "d_model": 512, "d_kv": 64, "num_heads": 8, "num_layers": 6, "d_ff": 2048}
_WORD_BYTES = 4


@dataclass(frozen=True, slots=True)
class Workload:
    inputs: list[list[int]]
    outputs: list[int]

    @classmethod
    def draw(cls, count: int, seed: int = 0) -> Workload:
        draw = random.Random(seed)
        lengths = [draw.randint(16, 256) for _ in range(count)]
        inputs = [[draw.randrange(2, SHAPE["vocab_size"]) for _ in range(length)] for length in lengths]
        return cls(inputs, [draw.randint(16, 64) for _ in range(count)])


def make_checkpoint(folder: Path) -> None:
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(**cast(Any, SHAPE), decoder_start_token_id=0, eos_token_id=None, pad_token_id=0)  # pyright: ignore[reportCallIssue]
    model = T5ForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            std = 0.1 if "shared" in name else 4 / weight.shape[1] ** 0.5
            torch.nn.init.normal_(weight, std=std / 8 if name.endswith("ttention.q.weight") else std)
    model.save_pretrained(folder)


def run_transformers(
    folder: Path, workload: Workload, batch_sizes: list[int], stopwatch: Stopwatch
) -> tuple[dict[int, float], list[list[int]]]:
    """Seconds by batch size, and the tokens of the last run."""
    from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration

    model = cast(Any, T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)).eval()
    order = sorted(range(len(workload.inputs)), key=lambda i: len(workload.inputs[i]))
    tokens: list[list[int]] = [[] for _ in order]

    def generate(batch_size: int) -> None:
        for at in range(0, len(order), batch_size):
            members = order[at : at + batch_size]
            longest = max(len(workload.inputs[i]) for i in members)
            ids = torch.zeros(len(members), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(members):
                ids[row, : len(workload.inputs[i])] = torch.tensor(workload.inputs[i])
                mask[row, : len(workload.inputs[i])] = 1
            num_new = max(workload.outputs[i] for i in members)
            with torch.inference_mode():
                out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=num_new)
            for row, i in enumerate(members):
                tokens[i] = out[row, 1 : 1 + workload.outputs[i]].tolist()

    seconds: dict[int, float] = {}
    for batch_size in batch_sizes:
        seconds[batch_size] = stopwatch.best(lambda b=batch_size: generate(b))
        progress(f"transformers, batches of {batch_size}: {seconds[batch_size]:.1f} s")
    return seconds, tokens


@torch.inference_mode()
def largest_shortfall(folder: Path, workload: Workload, tokens: list[list[int]]) -> float:
    """By how much the logit of a token falls short of the best one behind the same tokens, at most, as transformers has
    them; in standard deviations of these logits."""
    from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration

    model = cast(Any, T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)).eval()
    shortfalls: list[float] = []
    for source, text in zip(workload.inputs, tokens, strict=True):
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[0, *text[:-1]]])).logits[0]
        chosen = logits.gather(1, torch.tensor(text).view(-1, 1))[:, 0]
        shortfalls.append(float(((logits.amax(1) - chosen) / logits.std(1)).max()))
    return max(shortfalls)


def config_of(folder: Path, threads: int) -> SluiceConfig:
    return config_file.load(
        None,
        settings={
            "model.path": str(folder),
            "kv.block_size": BLOCK_SIZE,
            "kv.num_blocks": 256,
            "kv.prefix_cache": False,
            "scheduler.max_batched_tokens": 512,
            "scheduler.max_sequences": 32,
            "scheduler.max_encoder_tokens": 1024,
            "router.local_prefill": "always",
            "pools": {"decode": {"workers": 1, "threads": threads}},
        },
    )


def run_engine(folder: Path, workload: Workload, threads: int, stopwatch: Stopwatch) -> tuple[float, list[list[int]]]:
    """Seconds, and the tokens of the last run. Nothing is cached: every run reads every input."""
    parts = lone_engine(config_of(folder, threads), "decode")
    sequences: list[Sequence] = []

    def serve() -> None:
        sequences.clear()
        for number, (tokens, num_new) in enumerate(zip(workload.inputs, workload.outputs, strict=True)):
            root = chain_root(parts.compatibility_hash, encoder_tokens=tokens)
            params = SamplingParams(max_tokens=num_new, ignore_eos=True)
            seq = Sequence(
                parts.next_id(),
                RequestKey(str(number), 0),
                [0],
                1,
                params,
                arrival=number,
                encoder_input=EncoderInput(tuple(tokens), root),
            )
            sequences.append(seq)
            parts.scheduler.add(seq)
        while parts.engine.has_work:
            parts.engine.step()

    seconds = stopwatch.best(serve)
    progress(f"sluice: {seconds:.1f} s")
    return seconds, [seq.tokens[1:] for seq in sequences]


def weights_of(workload: Workload, stopwatch: Stopwatch) -> list[Figure]:
    """What is moved, and what computing it from hidden states would take here: one product per layer and side."""
    inner = SHAPE["num_heads"] * SHAPE["d_kv"]
    mean = sum(map(len, workload.inputs)) / len(workload.inputs)
    states_bytes = mean * SHAPE["d_model"] * _WORD_BYTES
    kept_bytes = 2 * SHAPE["num_layers"] * mean * inner * _WORD_BYTES
    states, weight = torch.randn(round(mean), SHAPE["d_model"]), torch.randn(SHAPE["d_model"], inner)

    def project() -> None:
        for _ in range(2 * SHAPE["num_layers"]):
            torch.mm(states, weight)

    seconds = stopwatch.best(project, 20)
    return [
        Figure("hidden states", states_bytes / 1e3, "kB/request", note=f"{mean:.0f} tokens, the mean input"),
        Figure("keys and values", kept_bytes / 1e3, "kB/request", note="what is moved"),
        Figure("from hidden states to keys and values", seconds * 1e3, "ms/request", note="on the sink"),
        Figure("break-even", (kept_bytes - states_bytes) / seconds / 1e9, "GB/s", note="faster links: keys and values"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32], help="of transformers")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on shared cores, with --threads 1")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    stopwatch = Stopwatch(CLOCKS[arguments.clock], arguments.repeats)
    setting, workload = Setting.here(), Workload.draw(arguments.requests)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        make_checkpoint(Path(name))
        ours, our_tokens = run_engine(Path(name), workload, arguments.threads, stopwatch)
        theirs, their_tokens = run_transformers(Path(name), workload, arguments.batch_sizes, stopwatch)
        ours_short, theirs_short = (
            largest_shortfall(Path(name), workload, tokens) for tokens in (our_tokens, their_tokens)
        )
    equal = sum(a == b for a, b in zip(our_tokens, their_tokens, strict=True))
    seen = len({token for tokens in our_tokens for token in tokens})
    count = sum(workload.outputs)
    note = f"{equal} of {len(our_tokens)} requests token for token as transformers, {seen} different tokens"
    figures = [Figure("sluice", count / ours, "output tok/s", note=note)]
    short = f"of its logits, by which a token is not the best one; transformers' own in batches: {theirs_short:.3f}"
    figures.append(Figure("shortfall", ours_short, "std", note=short))
    figures += [Figure(f"transformers, batches of {size}", count / s, "output tok/s") for size, s in theirs.items()]
    figures.append(Figure("sluice / transformers", min(theirs.values()) / ours, "x", 1.5, note="bound: the target"))
    figures += weights_of(workload, stopwatch)
    told = {name: getattr(arguments, name) for name in ("threads", "repeats", "requests", "batch_sizes", "clock")}
    publish(Report("encdec", f"T5 of {json.dumps(SHAPE)} on CPU", told, figures, setting), arguments.json)


if __name__ == "__main__":
    main()

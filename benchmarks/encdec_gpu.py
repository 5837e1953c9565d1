"""Encoder–decoder models on one GPU: encoder, context step and cached generation, beside what the card could do and
beside transformers on the same card.

    python -m benchmarks.encdec_gpu [--shape t5-large bart-large] [--sequences 1 32] [--repeats 3]
                                    [--tiny] [--json FILE]

Dummy weights in bf16, inputs uniform 64-512 and decoder prompts uniform 16-128 (random.Random(0)), prefix cache off,
greedy tokens. Medians of --repeats runs after one to warm up.

encoder:  inputs of 512 tokens, and mixed ones; input tokens / time. transformers pads the mixed ones to their longest.
context:  from the encoder's output to each sequence's first token: keys and values of all decoder layers, one step over
          all decoder prompts, the likeliest token; prompt tokens / time.
hop:      single tokens behind a cached context, by the whole engine with CUDA graphs and the next step prepared
          meanwhile; sequences * 64 / (time of 80 tokens each - time of 16). transformers: generate, with its default
          cache and with a static one (not compiled), the faster.

The bound counts FLOPs at the rate of a large product, or bytes at that of a device copy, both measured in the same run;
against transformers it is the target. Wants transformers, and under 3 minutes on an H200. --tiny only shows that
everything runs, on a CPU too: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.encdec_contenders import Contender, Ours, Transformers
from benchmarks.encdec_shapes import TINY, Shape, Workload
from benchmarks.report import Figure, Report, Setting, progress, publish

TARGET = 3.0  # times transformers
FIRST, LAST = 16, 80  # output tokens of the two runs whose difference is a hop


class Stopwatch:
    """Seconds by the wall, the device included: the median after one run to warm up."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device, self._repeats = device, repeats

    def __call__(self, work: Callable[[], object]) -> float:
        self._once(work)
        return statistics.median(self._once(work) for _ in range(self._repeats))

    def _once(self, work: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@dataclass(frozen=True, slots=True)
class Rates:
    """Of this device; None: nobody asks."""

    flops: float | None = None
    bytes_per_s: float | None = None

    @classmethod
    def measure(cls) -> Rates:
        from benchmarks.engine_gpu import Ceilings

        ceilings = Ceilings.measure()
        return cls(ceilings.flops, ceilings.bytes_per_s)


def per_second(rate: float | None, amount: float, tokens: float) -> float | None:
    """Tokens per second, where that many take `amount` at that rate."""
    return None if rate is None else tokens * rate / amount


@dataclass(frozen=True, slots=True)
class Race:
    """One shape: what is measured of ours, and of theirs."""

    shape: Shape
    ours: Ours
    theirs: list[Transformers]
    rates: Rates
    stopwatch: Stopwatch
    longest: int
    longest_prompt: int

    def encoder(self, count: int) -> list[Figure]:
        flops, figures = self.rates.flops, list[Figure]()
        equal = [[3 + i % 100] * self.longest for i in range(count)]
        for kind, sources in (("equal", equal), ("mixed", self._workload(count).sources)):
            lens = [len(tokens) for tokens in sources]
            tokens = sum(lens)
            ours = tokens / self.stopwatch(self.ours.encoder(sources))
            theirs = tokens / self.stopwatch(self.theirs[0].encoder(sources))
            name = f"{self.shape.name}: encoder, {count} {kind} inputs"
            bound = per_second(flops, self.shape.encoder_flops(lens), tokens)
            figures.append(Figure(name, ours, "tok/s", bound, note=f"{tokens} tokens; bound: FLOPs"))
            figures.append(
                Figure(f"{name} / transformers", ours / theirs, "x", note=f"transformers {theirs:.0f} tok/s")
            )
        return figures

    def context(self, count: int) -> list[Figure]:
        workload = self._workload(count)
        tokens = sum(workload.prompt_lens)
        ours = tokens / self.stopwatch(self.ours.context(workload))
        theirs = tokens / self.stopwatch(self.theirs[0].context(workload))
        amount = self.shape.context_flops(workload.source_lens, workload.prompt_lens)
        bound = per_second(self.rates.flops, amount, tokens)
        note = f"{tokens} tokens behind {sum(workload.source_lens)}; bound: FLOPs"
        return self._compared(f"context step of {count}", Figure("", ours, "tok/s", bound, note=note), theirs, "")

    def hop(self, count: int) -> list[Figure]:
        workload = self._workload(count)
        ours = self._hop_rate(self.ours, workload)
        by_cache = {each.cache or "default": self._hop_rate(each, workload) for each in self.theirs}
        best = max(by_cache, key=lambda cache: by_cache[cache])
        lens = workload.source_lens
        bound = per_second(self.rates.bytes_per_s, self.shape.hop_bytes(lens, (FIRST + LAST) / 2), count)
        note = f"{1e3 * count / ours:.2f} ms a step; bound: bytes"
        told = ", ".join(f"{cache} cache {rate:.0f}" for cache, rate in by_cache.items())
        figure = Figure("", ours, "tok/s", bound, note=note)
        return self._compared(f"hop of {count}", figure, by_cache[best], f": {told}")

    def _hop_rate(self, contender: Contender, workload: Workload) -> float:
        first, last = (self.stopwatch(lambda n=num_tokens: contender.hop(workload, n)) for num_tokens in (FIRST, LAST))
        return len(workload.sources) * (LAST - FIRST) / (last - first)

    def _compared(self, name: str, figure: Figure, theirs: float, told: str) -> list[Figure]:
        name = f"{self.shape.name}: {name}"
        own = Figure(name, figure.value, figure.unit, figure.bound, note=figure.note)
        note = f"transformers {theirs:.0f} tok/s{told}; bound: the target"
        return [own, Figure(f"{name} / transformers", figure.value / theirs, "x", TARGET, note=note)]

    def _workload(self, count: int) -> Workload:
        return Workload.draw(count, self.shape.vocab_size, longest=self.longest, longest_prompt=self.longest_prompt)


def measure(
    name: str, counts: list[int], device: torch.device, repeats: int, rates: Rates, *, tiny: bool
) -> list[Figure]:
    shape = Shape.named(name, tiny=tiny)
    longest, longest_prompt = (64, 16) if tiny else (512, 128)
    start = time.perf_counter()
    theirs = Transformers(shape, device)
    race = Race(
        shape=shape,
        ours=Ours(shape, device, max_sequences=max(counts), longest=max(longest, LAST + 1)),
        theirs=[theirs, theirs.with_cache("static")],
        rates=rates,
        stopwatch=Stopwatch(device, repeats),
        longest=longest,
        longest_prompt=longest_prompt,
    )
    figures = race.encoder(max(counts)) + race.context(max(counts))
    for count in counts:
        figures += race.hop(count)
    progress(f"{name}: {time.perf_counter() - start:.0f} s")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(TINY), nargs="+", default=list(TINY))
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU where there is no GPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.tiny:
        parser.error("no GPU is visible; --tiny shows on a CPU that everything runs")
    device = torch.device("cuda" if on_gpu else "cpu")
    rates = Rates() if arguments.tiny else Rates.measure()
    figures: list[Figure] = []
    if rates.flops is not None and rates.bytes_per_s is not None:
        figures.append(Figure("device copy", rates.bytes_per_s / 1e12, "TB/s", note="bytes read and written"))
        figures.append(Figure("product", rates.flops / 1e12, "TFLOP/s", note="bf16, 8192 cubed"))
    for name in arguments.shape:
        figures += measure(name, arguments.sequences, device, arguments.repeats, rates, tiny=arguments.tiny)
    where = torch.cuda.get_device_name() if on_gpu else "a CPU"
    told = {"shape": arguments.shape, "sequences": arguments.sequences, "repeats": arguments.repeats}
    what = f"{', '.join(arguments.shape)}{', tiny,' if arguments.tiny else ''} on {where}"
    publish(Report("encdec_gpu", what, told | {"tiny": arguments.tiny}, figures, Setting.here()), arguments.json)


if __name__ == "__main__":
    main()

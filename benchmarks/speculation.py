"""What guessing tokens brings and costs (`engine.speculation`), on a CPU.

    python -m benchmarks.speculation [--threads 2] [--tokens 192] [--repeats 2] [--batch-sizes 1 8] [--json FILE]

Greedy texts of the 100 M Llama shape of benchmarks.engine in fp32, with random weights of two kinds: under the ones a
text hardly repeats itself, under the others it ends in a loop. Each is written without guesses, with those of the
n-gram proposer, and with those of one that knows the text, which is the most that so many guesses can bring. A clock
starts with the prompts, of 32 to 64 tokens. Told: output tokens/s beside those without guesses in the same run, the
acceptance length (tokens for a sequence of a step that checks guesses for it), and how many texts are the same: a batch
of another size rounds otherwise, and may tip a token that won by a nose.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.engine import SHAPE, Stopwatch, Workload, make_checkpoint, run_engine
from benchmarks.report import Figure, Report, Setting, progress, publish
from workers.speculative.ngram import NgramProposer
from workers.speculative.proposer import Proposer

DRAFT_TOKENS, NGRAM_TOKENS = 4, 3  # the defaults of the config
TEXTS = {"varied": 4.0, "looping": 0.5}  # gain of the weights


class Reader:
    """Knows what is going to be written."""

    def __init__(self, workload: Workload, texts: Sequence[list[int]]) -> None:
        self._texts = [[*prompt, *text] for prompt, text in zip(workload.prompts, texts, strict=True)]

    def propose(self, id_: int, tokens: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        return tuple(self._texts[id_][len(tokens) : len(tokens) + min(max_tokens, DRAFT_TOKENS)])

    def judged(self, id_: int, num_drafts: int, num_accepted: int, num_tokens: int) -> None: ...

    def forget(self, id_: int) -> None: ...


class Counted:
    """Passes through, and counts."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer
        self.num_rows = self.num_accepted = 0

    @property
    def length(self) -> float:
        return 1 + self.num_accepted / self.num_rows if self.num_rows else 1.0

    def propose(self, id_: int, tokens: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        return self._proposer.propose(id_, tokens, max_tokens)

    def judged(self, id_: int, num_drafts: int, num_accepted: int, num_tokens: int) -> None:
        self.num_rows += 1
        self.num_accepted += num_accepted
        self._proposer.judged(id_, num_drafts, num_accepted, num_tokens)

    def forget(self, id_: int) -> None:
        self._proposer.forget(id_)


def workload_of(batch_size: int, num_tokens: int) -> Workload:
    draw = random.Random(0)
    prompts = [[draw.randrange(SHAPE["vocab_size"]) for _ in range(draw.randint(32, 64))] for _ in range(batch_size)]
    return Workload(prompts, [num_tokens] * batch_size)


def compare(kind: str, folder: Path, workload: Workload, stopwatch: Stopwatch) -> list[Figure]:
    """One kind of text, one batch size."""
    size = len(workload.prompts)
    without, texts, steps = run_engine(folder, workload, stopwatch)
    base = workload.num_output_tokens / without
    different = len({token for text in texts for token in text})
    figures = [
        Figure(
            f"{kind}, {size} at once",
            base,
            "output tok/s",
            note=f"without guesses; {len(steps)} steps, {different} different tokens",
        )
    ]
    proposers = {"n-gram": NgramProposer(DRAFT_TOKENS, NGRAM_TOKENS), "all right": Reader(workload, texts)}
    for name, proposer in proposers.items():
        counted = Counted(proposer)
        seconds, said, taken = run_engine(folder, workload, stopwatch, counted)
        same = sum(one == other for one, other in zip(said, texts, strict=True))
        length = f"acceptance length {counted.length:.2f}, {len(taken)} steps"
        note = f"{length}, {same} of {size} texts the same; bound: without"
        figures.append(
            Figure(
                f"{kind}, {size} at once, {name}", workload.num_output_tokens / seconds, "output tok/s", base, note=note
            )
        )
        progress(f"{figures[-1].name}: {figures[-1].ratio or 0:.2f} x")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = Setting.here()
    stopwatch = Stopwatch(time.perf_counter, options.repeats)
    figures: list[Figure] = []
    for kind, gain in TEXTS.items():
        with tempfile.TemporaryDirectory() as name:
            make_checkpoint(Path(name), gain)
            for size in options.batch_sizes:
                figures += compare(kind, Path(name), workload_of(size, options.tokens), stopwatch)
    told = {name: getattr(options, name) for name in ("threads", "tokens", "repeats", "batch_sizes")}
    publish(Report("speculation", "a 100 M Llama in fp32 on CPU, greedy", told, figures, setting), options.json)


if __name__ == "__main__":
    main()

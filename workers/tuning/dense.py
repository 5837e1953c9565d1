"""Products of many rows with one matrix: cuBLAS, or a kernel of cuBLASLt by number."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from workers.kernels.cublas_lt import LtError, LtProduct
from workers.kernels.dense_gemm import dense
from workers.kernels.tactic_table import DENSE_BUCKETS, Tactic, dense_key
from workers.kernels.tactics import LtKernel
from workers.tuning.problem import COLD_BYTES, Launched, captured, cold_us, drawn, replayed

_CLUSTERS = tuple(range(2, 10))  # cublasLtClusterShape_t: of one multiprocessor, to two by four
_FINAL = 5  # so many are measured again, by turns: a card grows slower as it grows hot
_ROUNDS = 8
_WORTH = 0.99  # of cuBLAS's time; what is nearer stays with it


class Effort(NamedTuple):
    """That the search for one kernel is worth."""

    tiles: int  # of the kernels that are proposed, tried in all clusters
    heat_us: float  # before all
    rough_us: float  # that each is measured for, at least
    final_us: float  # the same, in each of the last rounds


_STEP = Effort(16, 0, 0, 0)
# Long enough for the card to be at the limit of its power, where prompts have it: there the kernel that needs least
# energy is the fastest, and on a card that is still cool, whichever comes first.
_PROMPT = Effort(4, 1_500_000, 50_000, 80_000)


@dataclass(frozen=True)
class DenseProblem:
    num_rows: int
    outputs: int
    inputs: int

    @property
    def key(self) -> str:
        return dense_key(self.num_rows, (self.outputs, self.inputs))

    def variants(self) -> Iterable[tuple[str, Launched]]:
        return []  # all are compiled

    def compile(self, kernel: str, tactic: Launched) -> None:
        raise AssertionError("nothing to compile")

    def tune(self) -> tuple[Tactic | None, float, float]:
        count = min(max(2, -(-COLD_BYTES // (2 * self.outputs * self.inputs))), 12)
        weights = [drawn(self.outputs, self.inputs) for _ in range(count)]
        effort = _STEP if self.num_rows <= DENSE_BUCKETS[-1] else _PROMPT
        x = drawn(self.num_rows, self.inputs)

        def launches(kernel: LtKernel | None) -> list[Callable[[], Tensor]]:
            return [lambda w=weight: dense(x, w, kernel) for weight in weights]

        trial = LtProduct(torch.cuda.current_device(), (self.outputs, self.inputs), self.inputs)
        rough: dict[LtKernel, float] = {}

        def try_out(kernels: Iterable[LtKernel]) -> list[LtKernel]:
            """All so far, the fastest first."""
            for kernel in kernels:
                if kernel not in rough:
                    rough[kernel] = cold_us(launches(kernel), effort.rough_us)
            return sorted(rough, key=rough.__getitem__)

        if effort.heat_us:
            cold_us(launches(None), effort.heat_us)
        # What is proposed, its fastest tiles in all clusters, and those the other way over the product.
        fastest = try_out(trial.alternatives(self.num_rows))
        fastest = try_out(_clustered(trial, fastest, effort.tiles))
        fastest = try_out(_turned(trial, fastest))
        finalists = [None, *(kernel for kernel in fastest[:_FINAL] if isfinite(rough[kernel]))]
        graphs = {kernel: captured(launches(kernel)) for kernel in finalists}
        times: dict[LtKernel | None, list[float]] = {kernel: [] for kernel in finalists}
        repeats = 1 + int(effort.final_us / replayed(graphs[None]))
        for turn in range(_ROUNDS):
            for kernel, graph in list(graphs.items())[:: -1 if turn % 2 else 1]:
                times[kernel].append(replayed(graph, repeats) / count)
        medians = {kernel: statistics.median(each) for kernel, each in times.items()}
        best = min(medians, key=medians.__getitem__)
        if medians[best] > _WORTH * medians[None]:
            best = None
        return best, medians[best], medians[None]


def _clustered(trial: LtProduct, kernels: Sequence[LtKernel], tiles: int) -> list[LtKernel]:
    bare = list(dict.fromkeys(replace(each, swizzle=0, cluster=0) for each in kernels))[:tiles]
    return [each for each in (replace(a, cluster=c) for a, c in product(bare, _CLUSTERS)) if _exists(trial, each)]


def _turned(trial: LtProduct, kernels: Sequence[LtKernel]) -> list[LtKernel]:
    turned = [replace(each, swizzle=1 - each.swizzle) for each in kernels[:_FINAL] if each.swizzle in (0, 1)]
    return [each for each in turned if _exists(trial, each)]


def _exists(trial: LtProduct, kernel: LtKernel) -> bool:
    try:
        trial.choose(kernel)
    except LtError:
        return False
    return True

"""An op whose tactics are measured, and its time as in a step: in a CUDA graph, with inputs that are not in the L2."""

# pyright: reportMissingImports=false
from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from workers.kernels.tactic_table import Tactic
from workers.kernels.tactics import ExpertTactic

CUDA = torch.device("cuda")
COLD_BYTES = 300 << 20  # inputs rotate over so much: some times an H200's L2
SHARED_BYTES = 227 << 10  # of a multiprocessor, for one program
_ROUNDS = 5

# What one launch takes: of experts, one of the two products.
Launched: TypeAlias = Tactic | ExpertTactic

log = logging.getLogger("sluice.autotune")


class Problem(Protocol):
    """One op at one size."""

    @property
    def key(self) -> str: ...

    def variants(self) -> Iterable[tuple[str, Launched]]:
        """Launches to compile, each by a name of its kernel: all that `tune` may try."""
        ...

    def compile(self, kernel: str, tactic: Launched) -> None:
        """Once, at small size."""
        ...

    def tune(self) -> tuple[Tactic | None, float, float]:
        """The fastest, its microseconds, and those of the rule's. None: the rule's, which needs no entry."""
        ...


def captured(launches: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All launches in one graph, replayed once."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    return graph


def replayed(graph: torch.cuda.CUDAGraph, times: int = 1) -> float:
    """Microseconds, of one."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / times


def cold_us(launches: Sequence[Callable[[], object]], least_us: float = 0) -> float:
    """Median of the mean of all launches in one graph, replayed for `least_us` in all; infinite if one does not run."""
    try:
        graph = captured(launches)
    except Exception as error:  # noqa: BLE001 - whatever a compiler says of a tactic: it is not for here
        log.info("left out: %s", str(error).splitlines()[:1])
        return float("inf")
    times = 1 + int(least_us / replayed(graph) / _ROUNDS)
    return statistics.median(replayed(graph, times) / len(launches) for _ in range(_ROUNDS))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, device=CUDA, dtype=torch.bfloat16).mul_(0.05)

"""Measures which tactic is the fastest for each product of a model, on one GPU, and writes them down:

    python -m workers.autotune MODEL_FOLDER [--fp8] [--output FILE] [--jobs 12]

Only config.json is read. Each op is measured at the token counts of `tactic_table.BUCKETS`, as it runs in a step: in a
CUDA graph, launch behind launch, with weights that are not in the L2 (inputs rotate). Never while serving: a worker
reads the files at its start. A tactic that does not compile or run here is left out; the rule's own, which runs where
no file fits, is always among the candidates.

Shapes: T tokens, k slots per token, E slots, d hidden, I inner size.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import logging
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from workers.kernels.expert_routing import RowPlan, plan_rows
from workers.kernels.fp8 import BLOCK
from workers.kernels.grouped_gemm import down, gate_up, single_rows
from workers.kernels.skinny_gemm import skinny_gate_up, skinny_linear
from workers.kernels.tactic_table import (
    BUCKETS,
    DeviceSetting,
    Tactic,
    TacticTable,
    TunedFile,
    experts_key,
    skinny_key,
)
from workers.kernels.tactics import (
    SINGLE_ENTRIES,
    SKINNY_ROWS,
    ExpertTactic,
    ExpertTactics,
    SkinnyTactic,
    expert_tactics,
    fp8_expert_tactics,
    skinny_tactic,
)
from workers.layers.attention import GroupedQueryAttention
from workers.layers.mla import LatentAttention
from workers.layers.mlp import GatedMlp
from workers.layers.moe import SparseMlp
from workers.models.decoder import DecoderForCausalLM
from workers.models.loader import outline

CUDA = torch.device("cuda")
_COLD_BYTES = 300 << 20  # inputs rotate over so much: some times an H200's L2
_SHARED_BYTES = 227 << 10  # of a multiprocessor, for one program
_ROUNDS = 5

log = logging.getLogger("sluice.autotune")


class Problem(Protocol):
    """One op at one size."""

    @property
    def key(self) -> str: ...

    def variants(self) -> Iterable[tuple[str, Tactic | ExpertTactic]]:
        """Launches to compile, each by a name of its kernel: all that `tune` may try."""
        ...

    def compile(self, kernel: str, tactic: Tactic | ExpertTactic) -> None:
        """Once, at small size."""
        ...

    def tune(self) -> tuple[Tactic, float, float]:
        """The fastest, its microseconds, and those of the rule's."""
        ...


def cold_us(launches: Sequence[Callable[[], object]]) -> float:
    """Median of the mean of all launches in one graph; infinite if one does not run."""
    try:
        for launch in launches[:2]:
            launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()
    except Exception as error:  # noqa: BLE001 - whatever a compiler says of a tactic: it is not for here
        log.info("left out: %s", str(error).splitlines()[:1])
        return float("inf")
    graph.replay()
    times: list[float] = []
    for _ in range(_ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(launches))
    return statistics.median(times)


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, device=CUDA, dtype=torch.bfloat16).mul_(0.05)


def _ones(slots: int, rows: int, columns: int) -> Tensor:
    return torch.ones(slots, rows // BLOCK, columns // BLOCK, device=CUDA)


@dataclass(frozen=True)
class SkinnyProblem:
    """A product of SKINNY_ROWS or fewer with one matrix."""

    outputs: int  # gates and ups count once
    inputs: int
    gated: bool

    @property
    def key(self) -> str:
        return skinny_key((self._height, self.inputs), gated=self.gated)

    @property
    def _height(self) -> int:
        return self.outputs * (2 if self.gated else 1)

    def variants(self) -> Iterable[tuple[str, SkinnyTactic]]:
        seen = {skinny_tactic(self._height, gated=self.gated)}
        for cols, depth, ahead, stages in product((16, 32, 64), (128, 256, 512), (0, 512), (3, 4, 6)):
            stage = (cols * (2 if self.gated else 1) + SKINNY_ROWS) * depth * 2
            if stage * stages <= _SHARED_BYTES and (cols * depth >= 4096) and self.outputs >= 64 * cols:
                seen.add(SkinnyTactic(cols, depth, ahead, 4, stages))
        kernel = "skinny_gate_up" if self.gated else "skinny"
        return [(f"{kernel} {self.inputs % tactic.depth == 0}", tactic) for tactic in sorted(seen, key=str)]

    def compile(self, kernel: str, tactic: Tactic | ExpertTactic) -> None:
        assert isinstance(tactic, SkinnyTactic)
        height = 128 * (2 if self.gated else 1)
        self._launch(_drawn(1, self.inputs), _drawn(height, self.inputs), tactic)

    def _launch(self, x: Tensor, weight: Tensor, tactic: SkinnyTactic) -> None:
        (skinny_gate_up if self.gated else skinny_linear)(x, weight, tactic)

    def tune(self) -> tuple[Tactic, float, float]:
        size = self._height * self.inputs * 2
        weights = [_drawn(self._height, self.inputs) for _ in range(max(2, -(-_COLD_BYTES // size)))]
        x = _drawn(1, self.inputs)
        times = {
            tactic: cold_us([lambda w=weight, t=tactic: self._launch(x, w, t) for weight in weights])
            for _, tactic in self.variants()
        }
        best = min(times, key=times.__getitem__)
        return best, times[best], times[skinny_tactic(self._height, gated=self.gated)]


@dataclass(frozen=True)
class ExpertsProblem:
    """The two products of experts, chosen evenly."""

    num_tokens: int
    per_token: int
    num_experts: int  # of which tokens choose; slots behind them are every token's
    num_slots: int
    inner: int
    hidden: int
    in_fp8: bool

    @property
    def key(self) -> str:
        shape = (self.num_slots, 2 * self.inner, self.hidden)
        return experts_key("fp8_experts" if self.in_fp8 else "experts", self.num_tokens, self.per_token, shape)

    @property
    def _by_rule(self) -> ExpertTactics:
        entries = self.num_tokens * self.per_token
        by_rule = (fp8_expert_tactics if self.in_fp8 else expert_tactics)(entries, self.num_slots)
        assert by_rule is not None, "DeepGEMM's"
        return by_rule

    def _candidates(self) -> tuple[list[ExpertTactic], list[ExpertTactic]]:
        """Of the first product and of the second."""
        firsts, seconds = {self._by_rule.first}, {self._by_rule.second}
        per_slot = self.num_tokens * self.per_token / self.num_slots
        if self.in_fp8:
            heights = (16,) if per_slot <= 8 else (16, 32) if per_slot <= 24 else (32, 64)
            for rows, stages, warps in product(heights, (3, 4, 5), (4, 8)):
                firsts.add(ExpertTactic(rows, BLOCK, BLOCK, warps, stages))
                seconds |= {ExpertTactic(rows, cols, BLOCK, warps, stages + 1) for cols in (64, 128)}
        elif per_slot <= 64:
            heights = (16,) if per_slot <= 8 else (16, 32) if per_slot <= 24 else (32, 64)
            for rows, (cols, depth, stages) in product(
                heights, ((64, 64, 5), (64, 128, 3), (64, 128, 4), (128, 64, 3), (128, 64, 4), (128, 128, 2))
            ):
                firsts.add(ExpertTactic(rows, cols, depth, 4, stages, swap=True, tma=True))
                seconds.add(ExpertTactic(rows, cols, depth, 4, stages + 1, swap=True, tma=True))
        else:
            for rows, stages, group in product((64, 128), (3, 4), (8, 16)):
                firsts.add(ExpertTactic(rows, 128, 64, 8, stages, tma=True, group=group))
                seconds.add(ExpertTactic(rows, 128, 64, 4 if rows == 64 else 8, stages, tma=True, group=group))
                seconds.add(ExpertTactic(rows, 256, 64, 8, stages, tma=True, group=group))
        return (
            [each for each in sorted(firsts, key=str) if self._fits(each, 2)],
            [each for each in sorted(seconds, key=str) if self._fits(each, 1)],
        )

    def _fits(self, tactic: ExpertTactic, matrices: int) -> bool:
        stage = (tactic.cols * matrices + tactic.rows) * tactic.depth * (1 if self.in_fp8 else 2)
        return stage * tactic.stages <= _SHARED_BYTES

    def variants(self) -> Iterable[tuple[str, ExpertTactic]]:
        firsts, seconds = self._candidates()
        how = " single" if self.num_tokens * self.per_token <= SINGLE_ENTRIES else ""
        return [*((f"gate_up{how}", tactic) for tactic in firsts), *((f"down{how}", tactic) for tactic in seconds)]

    def _products(self, slots: int) -> tuple[Callable[..., object], Callable[..., object]]:
        """(chosen, plan, tactic) -> launch, of each of the two."""
        tokens = self.num_tokens if slots == self.num_slots else 32
        x, inner = _drawn(tokens, self.hidden), _drawn(tokens * self.per_token, self.inner)
        both = _drawn(slots, 2 * self.inner, self.hidden)
        downs = _drawn(slots, self.hidden, self.inner)
        if not self.in_fp8:
            return (
                lambda plan, tactic: gate_up(x, both, plan, tactic, self.per_token),
                lambda plan, tactic: down(inner, downs, plan, tactic),
            )
        from workers.kernels import fp8_grouped_gemm as fp8
        from workers.kernels.fp8_rows import quantize_rows

        rows, inner_rows = quantize_rows(x), quantize_rows(inner)
        first = fp8.ExpertMatrices(both.to(torch.float8_e4m3fn), _ones(slots, 2 * self.inner, self.hidden))
        second = fp8.ExpertMatrices(downs.to(torch.float8_e4m3fn), _ones(slots, self.hidden, self.inner))
        return (
            lambda plan, tactic: fp8.gate_up(rows, first, plan, tactic, self.per_token),
            lambda plan, tactic: fp8.down(inner_rows, second, plan, tactic),
        )

    def compile(self, kernel: str, tactic: Tactic | ExpertTactic) -> None:
        assert isinstance(tactic, ExpertTactic)
        launch = self._products(2)[("gate_up", "down").index(kernel.split(maxsplit=1)[0])]
        chosen = torch.zeros(32, self.per_token, dtype=torch.int32, device=CUDA)
        for plan in self._plans(chosen, tactic.rows, 2):
            launch(plan, tactic)

    def _plans(self, chosen: Tensor, tile: int, slots: int) -> list[RowPlan]:
        """One for each way of placing rows that may be tried."""
        plans = [plan_rows(chosen, slots, tile)]
        if self.num_tokens * self.per_token <= SINGLE_ENTRIES and tile == 16:
            few = chosen.flatten()[:SINGLE_ENTRIES].view(1, -1)
            plans.append(single_rows(few, torch.arange(SINGLE_ENTRIES, dtype=torch.int32, device=CUDA)))
        return plans

    def _draw(self) -> Tensor:
        drawn = torch.stack([torch.randperm(self.num_experts)[: self.per_token] for _ in range(self.num_tokens)])
        shared = self.num_slots - self.num_experts
        if shared and self._has_shared:
            drawn[:, -shared:] = torch.arange(self.num_experts, self.num_slots)
        return drawn.to(CUDA, torch.int32)

    @property
    def _has_shared(self) -> bool:
        from workers.kernels.tactics import DENSE_TOKENS

        return self.num_tokens < DENSE_TOKENS

    def tune(self) -> tuple[Tactic, float, float]:
        first, second = self._products(self.num_slots)
        rotating = [self._draw() for _ in range(8 if self.num_tokens <= 16 else 2)]
        firsts, seconds = self._candidates()
        by_rule = self._by_rule
        best: tuple[float, ExpertTactics] = (float("inf"), by_rule)
        ruled = float("inf")
        for rows, place in product(sorted({each.rows for each in firsts}), (0, 1)):
            plans = [self._plans(chosen, rows, self.num_slots) for chosen in rotating]
            if place >= len(plans[0]):
                continue
            planned = [each[place] for each in plans]
            planning = (
                0.0 if place else cold_us([lambda c=c, r=rows: plan_rows(c, self.num_slots, r) for c in rotating])
            )
            ours = {t: _launches(first, planned, t) for t in firsts if t.rows == rows}
            theirs = {t: _launches(second, planned, t) for t in seconds if t.rows == rows}
            if not ours or not theirs:
                continue
            a, b = min(ours, key=ours.__getitem__), min(theirs, key=theirs.__getitem__)
            best = min(best, (planning + ours[a] + theirs[b], ExpertTactics(a, b, sort=not place)), key=lambda c: c[0])
            if by_rule.sort == (not place) and by_rule.first in ours and by_rule.second in theirs:
                ruled = planning + ours[by_rule.first] + theirs[by_rule.second]
        return best[1], best[0], ruled


def _launches(launch: Callable[..., object], plans: Sequence[RowPlan], tactic: ExpertTactic) -> float:
    return cold_us([lambda p=plan: launch(p, tactic) for plan in plans])


def problems(model: DecoderForCausalLM, *, in_fp8: bool) -> list[Problem]:
    """Of a model on any device, "meta" too; each once."""
    found: dict[str, Problem] = {}

    def add(problem: Problem) -> None:
        found.setdefault(problem.key, problem)

    def add_mlp(mlp: GatedMlp) -> None:
        inner, hidden = mlp.gate_proj.weight.shape
        if not (in_fp8 and inner % BLOCK == 0):
            add(SkinnyProblem(inner, hidden, gated=True))
            add(SkinnyProblem(hidden, inner, gated=False))

    for layer in model.modules():
        if isinstance(layer, SparseMlp):
            expert = layer.experts[0]
            assert isinstance(expert, GatedMlp)
            inner, hidden = expert.gate_proj.weight.shape
            shared = 0 if layer.shared_experts is None else layer.shared_experts.gate_proj.weight.shape[0] // inner
            rule = layer.gate.rule
            for tokens in BUCKETS:
                apart = tokens >= 2048
                per_token = rule.experts_per_token + (0 if apart else shared)
                if in_fp8 and fp8_expert_tactics(tokens * per_token, rule.num_experts + shared) is None:
                    continue
                slots = rule.num_experts + shared
                add(ExpertsProblem(tokens, per_token, rule.num_experts, slots, inner, hidden, in_fp8))
            if layer.shared_experts is not None:
                add_mlp(layer.shared_experts)
        elif isinstance(layer, GroupedQueryAttention) and not in_fp8:
            height = sum(part.weight.shape[0] for part in (layer.q_proj, layer.k_proj, layer.v_proj))
            add(SkinnyProblem(height, layer.q_proj.weight.shape[1], gated=False))
            add(SkinnyProblem(*layer.o_proj.weight.shape, gated=False))
        elif isinstance(layer, LatentAttention) and layer.indexer is None and not in_fp8:
            queries = layer.q_proj if layer.shape.query_latent_size is None else layer.q_a_proj
            height = queries.weight.shape[0] + layer.kv_a_proj_with_mqa.weight.shape[0]
            add(SkinnyProblem(height, queries.weight.shape[1], gated=False))
            add(SkinnyProblem(*layer.o_proj.weight.shape, gated=False))
    sparse = {id(each) for layer in model.modules() if isinstance(layer, SparseMlp) for each in layer.modules()}
    for layer in model.modules():
        if isinstance(layer, GatedMlp) and id(layer) not in sparse:
            add_mlp(layer)
    head = model.config.decoder
    add(SkinnyProblem(head.vocab_size, head.hidden_size, gated=False))
    return list(found.values())


def _compile(problem: Problem, kernel: str, tactic: Tactic | ExpertTactic) -> None:
    """In a process of its own: fills Triton's cache on disk."""
    try:
        problem.compile(kernel, tactic)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - left out when it is measured
        log.info("%s %s: %s", kernel, tactic, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with a config.json")
    parser.add_argument("--fp8", action="store_true", help="for weights in fp8 blocks")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    arguments = parser.parse_args()
    model = outline(arguments.model, load_format="dummy")
    assert isinstance(model, DecoderForCausalLM), "only decoders have kernels to tune"
    found = problems(model, in_fp8=arguments.fp8)
    jobs = {(kernel, tactic): (each, kernel, tactic) for each in found for kernel, tactic in each.variants()}
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*jobs.values(), strict=True)))
    entries: dict[str, Tactic] = {}
    for problem in found:
        tactic, best, ruled = problem.tune()
        entries[problem.key] = tactic
        sys.stdout.write(f"{problem.key:45s} {best:8.1f} us, by rule {ruled:8.1f}: {tactic}\n")
        sys.stdout.flush()
        torch.cuda.empty_cache()
    TunedFile(DeviceSetting.of(CUDA), entries).write(arguments.output)
    sys.stdout.write(f"{TacticTable.tuned(DeviceSetting.of(CUDA), arguments.output.parent).source}\n")


if __name__ == "__main__":
    main()

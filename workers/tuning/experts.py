"""The two products of experts. Shapes: T tokens, k slots per token, E slots, d hidden, I inner size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from workers.kernels.expert_routing import RowPlan, plan_rows
from workers.kernels.fp8 import BLOCK
from workers.kernels.grouped_gemm import down, gate_up, single_rows
from workers.kernels.tactic_table import Tactic, experts_key
from workers.kernels.tactics import (
    DENSE_TOKENS,
    SINGLE_ENTRIES,
    ExpertTactic,
    ExpertTactics,
    expert_tactics,
    fp8_expert_tactics,
)
from workers.tuning.problem import CUDA, SHARED_BYTES, Launched, cold_us, drawn


def _ones(slots: int, rows: int, columns: int) -> Tensor:
    return torch.ones(slots, rows // BLOCK, columns // BLOCK, device=CUDA)


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
                heights,
                (
                    *((64, 64, 3), (64, 64, 4), (64, 64, 5), (64, 128, 3), (64, 128, 4)),
                    *((128, 64, 3), (128, 64, 4), (128, 128, 2)),
                ),
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
        return stage * tactic.stages <= SHARED_BYTES

    def variants(self) -> Iterable[tuple[str, ExpertTactic]]:
        firsts, seconds = self._candidates()
        how = " single" if self.num_tokens * self.per_token <= SINGLE_ENTRIES else ""
        return [*((f"gate_up{how}", tactic) for tactic in firsts), *((f"down{how}", tactic) for tactic in seconds)]

    def _products(self, slots: int) -> tuple[Callable[..., object], Callable[..., object]]:
        """(chosen, plan, tactic) -> launch, of each of the two."""
        tokens = self.num_tokens if slots == self.num_slots else 32
        x, inner = drawn(tokens, self.hidden), drawn(tokens * self.per_token, self.inner)
        both = drawn(slots, 2 * self.inner, self.hidden)
        downs = drawn(slots, self.hidden, self.inner)
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

    def compile(self, kernel: str, tactic: Launched) -> None:
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

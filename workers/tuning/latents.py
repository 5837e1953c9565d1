"""Attention of single tokens over latent rows, until its values are out of latent space.

Shapes: B sequences, H heads, L latent size, R rotary size, V value size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from workers.kernels.context_runs import ContextRuns, cut_contexts
from workers.kernels.latent_decode import latent_decode, programs_of
from workers.kernels.latent_exit import leave_latents
from workers.kernels.tactic_table import Tactic, latent_key
from workers.kernels.tactics import LATENT_LAUNCHES, LATENT_PROGRAMS, RunsTactic, latent_tactic
from workers.tuning.problem import COLD_BYTES, CUDA, SHARED_BYTES, Launched, cold_us, drawn

_CONTEXT = 2048  # on average: a graph is captured for a number of sequences, whatever their lengths
_BLOCK = 64
_LAUNCHES = 16  # of a graph: its own start is spread over them


@dataclass(frozen=True)
class LatentDecodeProblem:
    num_sequences: int
    num_heads: int
    latent: int
    rope: int
    value: int

    @property
    def key(self) -> str:
        return latent_key(self.num_sequences, self.num_heads, self.latent, self.rope)

    @property
    def _by_rule(self) -> RunsTactic:
        return latent_tactic(self.num_sequences, self.num_heads)

    def variants(self) -> Iterable[tuple[str, RunsTactic]]:
        seen = {self._by_rule}
        for programs, launch in product(LATENT_PROGRAMS, LATENT_LAUNCHES):
            tactic = RunsTactic(programs, *launch)
            if tactic.tile * (self.latent + self.rope) * 2 * (tactic.stages - 1) <= SHARED_BYTES:
                seen.add(tactic)
        return [("latent_decode", tactic) for tactic in sorted(seen, key=str)]

    def compile(self, kernel: str, tactic: Launched) -> None:
        assert kernel == "latent_decode" and isinstance(tactic, RunsTactic)
        scene = _Scene.drawn(self, 1, layers=2)
        scene.positions.zero_()
        scene.attend(1, scene.cut(tactic))

    def tune(self) -> tuple[Tactic, float, float]:
        size = self.num_sequences * _CONTEXT * (self.latent + self.rope) * 2
        layers = max(2, -(-COLD_BYTES // size))
        scene = _Scene.drawn(self, self.num_sequences, layers)
        rotating = [index % layers for index in range(max(layers, _LAUNCHES))]
        times: dict[RunsTactic, float] = {}
        for _, tactic in self.variants():
            cut = scene.cut(tactic)
            times[tactic] = cold_us([lambda i=layer, c=cut: scene.attend(i, c) for layer in rotating])
        best = min(times, key=times.__getitem__)
        return best, times[best], times[self._by_rule]


@dataclass(frozen=True)
class _Scene:
    problem: LatentDecodeProblem
    q: Tensor  # [B, H, L + R]
    positions: Tensor
    pages: Tensor
    table: Tensor  # in no order, as after some time of serving
    weights: Tensor  # [H, V, L]
    out: Tensor

    @classmethod
    def drawn(cls, problem: LatentDecodeProblem, sequences: int, layers: int) -> _Scene:
        row = problem.latent + problem.rope
        # From short ones to such of nearly twice the average, evenly.
        blocks = [max(1, round((2 * index + 1) * _CONTEXT / _BLOCK / sequences)) for index in range(sequences)]
        table = torch.zeros(sequences, max(blocks), dtype=torch.int32, device=CUDA)
        given = torch.randperm(sum(blocks), device=CUDA).to(torch.int32).split(blocks)
        for of_sequence, mine in zip(table, given, strict=True):
            of_sequence[: len(mine)] = mine
        return cls(
            problem,
            drawn(sequences, problem.num_heads, row),
            torch.tensor(blocks, device=CUDA) * _BLOCK - 1,
            drawn(sum(blocks), layers, _BLOCK, row),
            table,
            drawn(problem.num_heads, problem.value, problem.latent),
            drawn(sequences, problem.num_heads, problem.value),
        )

    def cut(self, tactic: RunsTactic) -> ContextRuns:
        return cut_contexts(self.positions, programs_of(self.problem.num_heads), tactic)

    def attend(self, layer: int, cut: ContextRuns) -> None:
        absorbed, rope = self.q.split([self.problem.latent, self.problem.rope], -1)
        scale = self.q.shape[-1] ** -0.5  # any: it takes the same time
        seen = latent_decode(absorbed, rope, self.pages, self.table, layer, scale, cut)
        leave_latents(seen, self.weights, self.out)

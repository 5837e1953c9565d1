"""Products of a few rows with one large matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from workers.kernels.skinny_gemm import skinny_gate_up, skinny_linear
from workers.kernels.tactic_table import Tactic, skinny_key
from workers.kernels.tactics import SKINNY_ROWS, SkinnyTactic, skinny_tactic
from workers.tuning.problem import COLD_BYTES, SHARED_BYTES, Launched, cold_us, drawn


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
            if stage * stages <= SHARED_BYTES and (cols * depth >= 4096) and self.outputs >= 64 * cols:
                seen.add(SkinnyTactic(cols, depth, ahead, 4, stages))
        kernel = "skinny_gate_up" if self.gated else "skinny"
        return [(f"{kernel} {self.inputs % tactic.depth == 0}", tactic) for tactic in sorted(seen, key=str)]

    def compile(self, kernel: str, tactic: Launched) -> None:
        assert isinstance(tactic, SkinnyTactic)
        height = 128 * (2 if self.gated else 1)
        self._launch(drawn(1, self.inputs), drawn(height, self.inputs), tactic)

    def _launch(self, x: Tensor, weight: Tensor, tactic: SkinnyTactic) -> None:
        (skinny_gate_up if self.gated else skinny_linear)(x, weight, tactic)

    def tune(self) -> tuple[Tactic, float, float]:
        size = self._height * self.inputs * 2
        weights = [drawn(self._height, self.inputs) for _ in range(max(2, -(-COLD_BYTES // size)))]
        x = drawn(1, self.inputs)
        times = {
            tactic: cold_us([lambda w=weight, t=tactic: self._launch(x, w, t) for weight in weights])
            for _, tactic in self.variants()
        }
        best = min(times, key=times.__getitem__)
        return best, times[best], times[skinny_tactic(self._height, gated=self.gated)]

"""How matrices that are stored in fp8 blocks multiply. Pure, so that ranks can compare their choices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.errors import ConfigError
from workers.attention.environment import FAST, Environment
from workers.kernels.fp8 import BLOCK

DEEP_GEMM = "deep_gemm"
DEQUANTIZED = "dequantized"


@dataclass(frozen=True, slots=True)
class GemmProblem:
    block: tuple[int, int]  # rows and columns of a stored block
    dtype: torch.dtype  # of activations


@dataclass(frozen=True, slots=True)
class GemmChoice:
    """`chosen` is "deep_gemm": matrices stay in fp8, rows are quantised; or "dequantized": they are widened on load."""

    chosen: str
    rejected: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "; ".join([f"fp8 blocks: {self.chosen}", *(f"not {name}: {reason}" for name, reason in self.rejected)])


def resolve_gemm(problem: GemmProblem, environment: Environment) -> GemmChoice:
    """A CPU widens, and no word is said. Raises ConfigError where a GPU would, and strict forbids it."""
    if environment.device_type != "cuda":
        return GemmChoice(DEQUANTIZED)
    reason = _refuses(problem, environment)
    if reason is None:
        return GemmChoice(DEEP_GEMM)
    if environment.strict:
        raise ConfigError(
            "engine.strict",
            f"matrices in fp8 blocks would be widened ({DEEP_GEMM}: {reason}); set engine.strict=false to allow it",
        )
    return GemmChoice(DEQUANTIZED, ((DEEP_GEMM, reason),))


def _refuses(problem: GemmProblem, environment: Environment) -> str | None:
    if environment.capability != FAST:
        capability = environment.capability or (0, 0)
        return f"runs on SM{FAST[0]}{FAST[1]}, not on SM{capability[0]}{capability[1]}"
    if problem.dtype != torch.bfloat16:
        return f"computes bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.block != (BLOCK, BLOCK):
        return f"blocks of {BLOCK} x {BLOCK}, not {problem.block[0]} x {problem.block[1]}"
    return environment.lacks(DEEP_GEMM) or environment.lacks("triton")

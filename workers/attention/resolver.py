"""Which attention backend computes a problem. Pure, so that ranks can compare their choices before they start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from cluster.errors import ConfigError
from workers.attention.interface import AttentionBackend, AttentionProblem
from workers.attention.mla_interface import MlaBackend, MlaProblem
from workers.attention.mla_reference import ReferenceMla
from workers.attention.reference import ReferenceAttention

_P_contra = TypeVar("_P_contra", contravariant=True)
_B_co = TypeVar("_B_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Environment:
    """What this process may use. Probed once, at start, and handed on."""

    device_type: str

    @classmethod
    def probe(cls, device: torch.device) -> Environment:
        return cls(device_type=device.type)


@dataclass(frozen=True, slots=True)
class Choice:
    """`rejected` says why of every candidate that came before the chosen one."""

    chosen: str
    rejected: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "; ".join([f"attention: {self.chosen}", *(f"not {name}: {reason}" for name, reason in self.rejected)])


def _reference_refuses(problem: AttentionProblem, environment: Environment) -> str | None:
    if problem.kind != "gqa":
        return f"computes gqa, not {problem.kind}"
    if environment.device_type != "cpu":
        return f"runs on cpu, not on {environment.device_type}"
    if problem.num_heads % problem.num_kv_heads:
        return f"{problem.num_heads} query heads are no multiple of {problem.num_kv_heads} K/V heads"
    return None


def _mla_reference_refuses(problem: MlaProblem, environment: Environment) -> str | None:
    if environment.device_type != "cpu":
        return f"runs on cpu, not on {environment.device_type}"
    if problem.sliding_window is not None:
        return f"every token sees its whole context, not a window of {problem.sliding_window}"
    return None


@dataclass(frozen=True, slots=True)
class _Candidate(Generic[_P_contra, _B_co]):
    refuses: Callable[[_P_contra, Environment], str | None]
    build: Callable[[_P_contra], _B_co]


# Best first.
_CANDIDATES = {"reference": _Candidate(_reference_refuses, ReferenceAttention)}
_MLA_CANDIDATES = {"reference": _Candidate(_mla_reference_refuses, ReferenceMla)}


def resolve(problem: AttentionProblem | MlaProblem, environment: Environment, wanted: Sequence[str] = ()) -> Choice:
    """The first of `wanted` (all backends, best first, when empty) that takes the problem.

    Raises ConfigError with every reason when none does.
    """
    if isinstance(problem, MlaProblem):
        return _resolve(problem, environment, wanted, _MLA_CANDIDATES)
    return _resolve(problem, environment, wanted, _CANDIDATES)


def _resolve(
    problem: _P_contra,
    environment: Environment,
    wanted: Sequence[str],
    candidates: Mapping[str, _Candidate[_P_contra, object]],
) -> Choice:
    rejected: list[tuple[str, str]] = []
    for name in wanted or candidates:
        candidate = candidates.get(name)
        reason = (
            f"no such backend, known are {', '.join(candidates)}"
            if candidate is None
            else candidate.refuses(problem, environment)
        )
        if reason is None:
            return Choice(name, tuple(rejected))
        rejected.append((name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    raise ConfigError("attention", f"no backend computes this model here ({reasons})")


def build(choice: Choice, problem: AttentionProblem) -> AttentionBackend:
    return _CANDIDATES[choice.chosen].build(problem)


def build_mla(choice: Choice, problem: MlaProblem) -> MlaBackend:
    return _MLA_CANDIDATES[choice.chosen].build(problem)

"""Which attention backend computes a problem. Pure, so that ranks can compare their choices before they start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from cluster.errors import ConfigError
from workers.attention.encoder_decoder import ReferenceBackend
from workers.attention.environment import Environment
from workers.attention.index_keys import HEAD_DIM
from workers.attention.index_tools import PAGE, IndexTools, lacking_tools
from workers.attention.interface import AttentionBackend, AttentionProblem, EncoderDecoderBackend
from workers.attention.mla_interface import MlaBackend, MlaProblem
from workers.attention.mla_reference import ReferenceMla
from workers.attention.reference import ReferenceAttention

if TYPE_CHECKING:
    from workers.attention.hopper_dsa import HopperDsa
    from workers.attention.hopper_mla import HopperMla

HOPPER = "hopper"  # the backend whose models run fused
CAPTURED = frozenset({HOPPER})  # backends whose decode steps can be replayed as CUDA graphs

_P_contra = TypeVar("_P_contra", contravariant=True)
_B_co = TypeVar("_B_co", covariant=True)
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Choice:
    """`rejected` says why of every candidate that came before the chosen one, and of what that one does without."""

    chosen: str
    rejected: tuple[tuple[str, str], ...]
    dense_context: int | None = None  # a decode step of a longer context launches other kernels; None: never
    reads_spans: bool = False  # steps with prompts can be CUDA graphs, too

    @property
    def replays(self) -> bool:
        """Whether decode steps can be CUDA graphs."""
        return self.chosen in CAPTURED

    @property
    def least_graph_step(self) -> int:
        """From one captured number of sequences to the next, from there on; chosen rows are planned for every eighth
        number alone."""
        return 1 if self.dense_context is None else 8

    def __str__(self) -> str:
        return "; ".join([f"attention: {self.chosen}", *(f"not {name}: {reason}" for name, reason in self.rejected)])


def _reference_refuses(problem: AttentionProblem, environment: Environment) -> str | None:
    if problem.kind not in ("gqa", "encoder_decoder"):
        return f"computes gqa and encoder_decoder, not {problem.kind}"
    if problem.num_heads % problem.num_kv_heads:
        return f"{problem.num_heads} query heads are no multiple of {problem.num_kv_heads} K/V heads"
    return None


def _mla_reference_refuses(problem: MlaProblem, environment: Environment) -> str | None:
    if problem.sliding_window is not None:
        return f"every token sees its whole context, not a window of {problem.sliding_window}"
    return None


def _hopper_lacks(dtype: torch.dtype, block_size: int, environment: Environment) -> str | None:
    if environment.capability != (9, 0):
        return f"runs on SM90, not on {_card(environment)}"
    if dtype not in _HALF:
        return f"computes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if block_size % 64:
        return f"blocks of {block_size} tokens are no multiple of 64"
    return environment.lacks("flashinfer") or environment.lacks("triton")


def _hopper_refuses(problem: AttentionProblem, environment: Environment) -> str | None:
    if problem.kind not in ("gqa", "encoder_decoder"):
        return f"computes gqa and encoder_decoder, not {problem.kind}"
    if problem.head_dim not in (64, 128):
        return f"heads of 64 or 128 features, not {problem.head_dim}"
    return _reference_refuses(problem, environment) or _hopper_lacks(problem.dtype, problem.block_size, environment)


def _hopper_mla_refuses(problem: MlaProblem, environment: Environment) -> str | None:
    shape = (problem.latent_size, problem.rope_size, problem.nope_size, problem.value_size)
    if shape != (512, 64, 128, 128):
        return f"latent, rotated, unrotated and value sizes of 512, 64, 128, 128, not {', '.join(map(str, shape))}"
    reason = _mla_reference_refuses(problem, environment)
    reason = reason or _hopper_lacks(problem.dtype, problem.block_size, environment)
    return reason or (None if problem.index_topk is None else _hopper_dsa_refuses(problem, environment))


def _hopper_dsa_refuses(problem: MlaProblem, environment: Environment) -> str | None:
    """Of the indexer alone. Pieces that are missing are done without, unless degrading is forbidden."""
    if problem.index_head_dim != HEAD_DIM:
        return f"index heads of {HEAD_DIM} features, not {problem.index_head_dim}"
    if problem.block_size != PAGE:
        return f"index keys lie in blocks of {PAGE} tokens, not {problem.block_size}"
    lacking = _lacking_tools(problem, environment)
    return "; ".join(f"{name}: {reason}" for name, reason in lacking) if environment.strict and lacking else None


def _lacking_tools(problem: MlaProblem, environment: Environment) -> tuple[tuple[str, str], ...]:
    if problem.index_topk is None:
        return ()
    return lacking_tools(environment, problem.index_heads or 0, problem.index_topk)


def _trtllm_gen_refuses(problem: MlaProblem, environment: Environment) -> str | None:
    """The support rules of FlashInfer's trtllm-gen MLA decode. Never measured here, so never chosen."""
    if environment.capability not in ((10, 0), (10, 3)):
        return f"runs on SM100 and SM103, not on {_card(environment)}"
    row = (problem.latent_size + problem.rope_size, problem.latent_size)
    if row not in ((576, 512), (320, 256)):
        return f"key and value sizes of (576, 512) or (320, 256), not {row}"
    if problem.block_size not in (32, 64):
        return f"blocks of 32 or 64 tokens, not {problem.block_size}"
    if problem.sliding_window is not None:
        return f"every token sees its whole context, not a window of {problem.sliding_window}"
    if problem.index_topk is not None:
        return "every token sees its whole context, not the index_topk best"
    if problem.dtype != torch.bfloat16:
        return f"computes bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    return environment.lacks("flashinfer") or "fits, but was never measured"


def _card(environment: Environment) -> str:
    if environment.capability is None:
        return environment.device_type
    major, minor = environment.capability
    return f"SM{major}{minor}"


@dataclass(frozen=True, slots=True)
class _Candidate(Generic[_P_contra, _B_co]):
    devices: tuple[str, ...]  # types that it is meant for; no word is said about it on others
    refuses: Callable[[_P_contra, Environment], str | None]
    build: Callable[[_P_contra], _B_co]


def _build_hopper(problem: AttentionProblem) -> AttentionBackend:
    from workers.attention.hopper_gqa import HopperGqa

    return HopperGqa(problem)


def _build_hopper_mla(problem: MlaProblem) -> HopperMla:
    from workers.attention.hopper_mla import HopperMla

    return HopperMla(problem)


def _build_nothing(problem: MlaProblem) -> MlaBackend:
    raise AssertionError("trtllm-gen is never chosen")


# Best first; the reference is the last resort on a GPU.
_CANDIDATES = {
    HOPPER: _Candidate(("cuda",), _hopper_refuses, _build_hopper),
    "reference": _Candidate(("cpu", "cuda"), _reference_refuses, ReferenceAttention),
}
_MLA_CANDIDATES: dict[str, _Candidate[MlaProblem, MlaBackend | HopperMla]] = {
    "trtllm-gen": _Candidate(("cuda",), _trtllm_gen_refuses, _build_nothing),
    HOPPER: _Candidate(("cuda",), _hopper_mla_refuses, _build_hopper_mla),
    "reference": _Candidate(("cpu", "cuda"), _mla_reference_refuses, ReferenceMla),
}


def resolve(problem: AttentionProblem | MlaProblem, environment: Environment, wanted: Sequence[str] = ()) -> Choice:
    """The first of `wanted` (all backends, best first, when empty) that takes the problem.

    Raises ConfigError with every reason when none does, or only the reference on a GPU and degrading is forbidden.
    """
    if isinstance(problem, MlaProblem):
        choice = _resolve(problem, environment, wanted, _MLA_CANDIDATES)
        if choice.chosen != HOPPER:
            return choice
        missing = _lacking_tools(problem, environment)
        return replace(choice, rejected=choice.rejected + missing, dense_context=problem.index_topk)
    choice = _resolve(problem, environment, wanted, _CANDIDATES)
    return replace(choice, reads_spans=choice.replays and problem.kind == "encoder_decoder")


def _resolve(
    problem: _P_contra,
    environment: Environment,
    wanted: Sequence[str],
    candidates: Mapping[str, _Candidate[_P_contra, object]],
) -> Choice:
    rejected: list[tuple[str, str]] = []
    meant = [name for name, candidate in candidates.items() if environment.device_type in candidate.devices]
    for name in wanted or meant:
        candidate = candidates.get(name)
        reason = (
            f"no such backend, known are {', '.join(meant)}"
            if candidate is None
            else _elsewhere(candidate.devices, environment)
            or _switched_off(name, environment)
            or candidate.refuses(problem, environment)
        )
        if reason is None:
            if environment.strict and name == "reference" and environment.device_type != "cpu" and not wanted:
                break
            return Choice(name, tuple(rejected))
        rejected.append((name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    if environment.strict:
        remedy = "set engine.strict=false to compute with the reference"
        raise ConfigError("engine.strict", f"no fast backend computes this model here ({reasons}); {remedy}")
    raise ConfigError("attention", f"no backend computes this model here ({reasons})")


def _switched_off(name: str, environment: Environment) -> str | None:
    return "is switched off" if name in environment.disabled else None


def _elsewhere(devices: tuple[str, ...], environment: Environment) -> str | None:
    known = environment.device_type in devices
    return None if known else f"runs on {' and '.join(devices)}, not on {environment.device_type}"


def build(choice: Choice, problem: AttentionProblem) -> AttentionBackend:
    return _CANDIDATES[choice.chosen].build(problem)


def build_encoder_decoder(choice: Choice, problem: AttentionProblem, device: torch.device) -> EncoderDecoderBackend:
    if choice.chosen == HOPPER:
        from workers.attention.hopper_encoder_decoder import HopperKernels
        from workers.attention.packed import PackedBackend

        return PackedBackend(problem, HopperKernels())
    return ReferenceBackend(problem, in_place=device.type == "cpu")


def build_mla(choice: Choice, problem: MlaProblem) -> MlaBackend | HopperMla | HopperDsa:
    if choice.chosen == HOPPER and problem.index_topk is not None:
        from workers.attention.hopper_dsa import HopperDsa

        return HopperDsa(problem, IndexTools.without(dict(choice.rejected)))
    return _MLA_CANDIDATES[choice.chosen].build(problem)

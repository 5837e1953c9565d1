"""How kernels are launched, by shape. None changes what is computed but for rounding; nothing here needs a GPU.

The numbers were measured on an H200, under CUDA graphs, on weights and caches far larger than its L2.
"""

from __future__ import annotations

from dataclasses import dataclass

_PROGRAMS = 264  # two for each of an H200's 132 multiprocessors
MAX_SPLITS = 32
SINGLE_ENTRIES = 16  # up to here entries are not sorted by expert
SKINNY_ROWS = 16  # up to here the gates and ups of a dense layer, and the head, are ours; the rest is cuBLAS's
ROUTER_ROWS = 256  # the same for a router, whose matrix is small

DENSE_TOKENS = 2048  # from here on a shared expert is computed apart from the others


@dataclass(frozen=True, slots=True)
class DecodeTactic:
    splits: int  # runs of a context, one program each; a power of two
    tile: int  # tokens at a time; divides the block size
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class RunsTactic:
    programs: int  # that share all contexts
    tile: int  # tokens at a time; divides the block size
    warps: int
    stages: int
    pieces: int = 1  # of a row of latents, that are multiplied side by side; 1 or 4


@dataclass(frozen=True, slots=True)
class ExpertTactic:
    rows: int  # of a tile; 16 or more
    cols: int  # output features of a program
    depth: int  # input features at a time
    warps: int
    stages: int
    swap: bool = False  # weights times rows instead of rows times weights: wide weight tiles for few rows
    tma: bool = False  # weights come through the bulk copy engine
    group: int = 8  # tiles of rows that run side by side on one piece of the weights


@dataclass(frozen=True, slots=True)
class ExpertTactics:
    """Of the two products of experts; both have the same tile of rows."""

    first: ExpertTactic
    second: ExpertTactic
    sort: bool = True  # else each entry is a tile of its own; up to SINGLE_ENTRIES


@dataclass(frozen=True, slots=True)
class SkinnyTactic:
    cols: int  # output features of a program
    depth: int  # input features at a time
    ahead: int  # input features of each that are fetched before the kernel ahead has ended; a power of two, or 0
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class LtKernel:
    """Of cuBLASLt, by its numbers (cublasLt.h): an algorithm and what it is configured with. For products of more rows
    than SKINNY_ROWS, where it was measured to be faster than what cuBLAS chooses by rules."""

    algorithm: int
    tile: int
    swizzle: int
    custom: int
    stages: int
    inner: int
    cluster: int


def skinny_tactic(outputs: int, *, gated: bool) -> SkinnyTactic:
    """Of a product of SKINNY_ROWS or fewer. Where programs are few, each has more under way, and begins early."""
    if gated:
        return SkinnyTactic(32, 128, 0, 4, 4)
    if outputs >= 64 * _PROGRAMS:
        return SkinnyTactic(64, 128, 0, 4, 3)
    if outputs >= 6000:
        return SkinnyTactic(64, 256, 0, 4, 3)
    return SkinnyTactic(32, 256, 512, 4, 6) if outputs >= 3000 else SkinnyTactic(16, 512, 512, 4, 6)


ROUTER = SkinnyTactic(16, 512, 512, 4, 4)  # of few experts, the same for all models


def num_splits(programs: int) -> int:
    """How many runs a context is cut into when `programs` would work on whole contexts: all run at once."""
    splits = 1
    while splits < MAX_SPLITS and 2 * splits * programs <= _PROGRAMS:
        splits *= 2
    return splits


def decode_tactic(programs: int) -> DecodeTactic:
    """Of K/V pages, each context by itself; programs: sequences × key/value heads."""
    splits = num_splits(max(programs, 1))
    if splits == 1:
        return DecodeTactic(1, tile=32, warps=2, stages=4)
    return DecodeTactic(splits, tile=64, warps=4, stages=3)


RUNS = RunsTactic(2 * _PROGRAMS, tile=32, warps=1, stages=4)  # of K/V pages, all contexts together


def latent_tactic(num_sequences: int, num_heads: int) -> RunsTactic:
    if num_heads > 16:
        return RunsTactic(_PROGRAMS // 2, tile=64, warps=8, stages=2)
    if num_sequences <= 128:
        return RunsTactic(_PROGRAMS // 2, tile=64, warps=4, stages=3, pieces=4)
    return RunsTactic(_PROGRAMS, tile=32, warps=4, stages=3)


# What workers.autotune measures instead: programs, and tile, warps, stages and pieces.
LATENT_PROGRAMS = (_PROGRAMS // 2, _PROGRAMS, 3 * _PROGRAMS // 2)
LATENT_LAUNCHES = (
    *((16, 4, 4), (16, 4, 6)),
    *((32, 4, 2), (32, 4, 3), (32, 4, 5), (32, 8, 3), (32, 8, 5)),
    *((64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3)),
    *((32, 4, 3, 4), (64, 4, 3, 4)),
)


def sparse_tactic(num_queries: int, num_heads: int) -> DecodeTactic:
    """Of rows chosen one by one."""
    splits = num_splits(2 * max(num_queries, 1) * -(-num_heads // 64))
    return DecodeTactic(splits, tile=64, warps=8, stages=2)


SHORT_ROWS = DecodeTactic(4, tile=64, warps=8, stages=2)  # of the few queries of a step that choose fewer rows


_FEW = ExpertTactic(16, 64, 128, 4, 4, swap=True, tma=True)
_EXPERTS = (
    ExpertTactics(_FEW, _FEW, sort=False),
    ExpertTactics(
        ExpertTactic(16, 64, 128, 4, 3, swap=True, tma=True), ExpertTactic(16, 128, 64, 4, 4, swap=True, tma=True)
    ),
    ExpertTactics(ExpertTactic(64, 64, 64, 4, 4), ExpertTactic(64, 128, 64, 4, 3, swap=True, tma=True)),
    ExpertTactics(ExpertTactic(128, 128, 64, 8, 3, tma=True), ExpertTactic(128, 256, 64, 8, 4, tma=True)),
)
_FP8_FEW = ExpertTactic(16, 128, 128, 4, 3), ExpertTactic(16, 128, 128, 4, 4)
_FP8_EXPERTS = (
    ExpertTactics(*_FP8_FEW, sort=False),
    ExpertTactics(*_FP8_FEW),
    ExpertTactics(ExpertTactic(32, 128, 128, 4, 3), ExpertTactic(32, 128, 128, 4, 4)),
)


def expert_tactics(num_entries: int, num_slots: int) -> ExpertTactics:
    """Of `num_entries` rows over `num_slots` experts."""
    if num_entries <= SINGLE_ENTRIES:
        return _EXPERTS[0]
    per_slot = num_entries / num_slots
    return _EXPERTS[1 if per_slot <= 20 else 2 if per_slot <= 96 else 3]


def fp8_expert_tactics(num_entries: int, num_slots: int) -> ExpertTactics | None:
    """The same in fp8, where weights times rows is the only way round; None: rows in tiles, by DeepGEMM."""
    if num_entries <= SINGLE_ENTRIES:
        return _FP8_EXPERTS[0]
    per_slot = num_entries / num_slots
    return _FP8_EXPERTS[1] if per_slot <= 20 else _FP8_EXPERTS[2] if per_slot <= 64 else None

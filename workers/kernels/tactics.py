"""How kernels are launched, by shape. None changes what is computed but for rounding; nothing here needs a GPU.

The numbers were measured on an H200, under CUDA graphs, on weights and caches far larger than its L2.
"""

from __future__ import annotations

from dataclasses import dataclass

_PROGRAMS = 264  # two for each of an H200's 132 multiprocessors
_MAX_SPLITS = 32
SINGLE_ENTRIES = 64  # up to here entries are not sorted by expert
SKINNY_ROWS = 16  # up to here the gates and ups of a dense layer, and the head, are ours; the rest is cuBLAS's

DENSE_TOKENS = 2048  # from here on a shared expert is computed apart from the others


@dataclass(frozen=True, slots=True)
class DecodeTactic:
    splits: int  # runs of a context, one program each; a power of two
    tile: int  # tokens at a time; divides the block size
    warps: int
    stages: int


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


SKINNY = ExpertTactic(SKINNY_ROWS, 64, 128, 4, 3, swap=True, tma=True)


def num_splits(programs: int) -> int:
    """How many runs a context is cut into when `programs` would work on whole contexts: all run at once."""
    splits = 1
    while splits < _MAX_SPLITS and 2 * splits * programs <= _PROGRAMS:
        splits *= 2
    return splits


def decode_tactic(programs: int) -> DecodeTactic:
    """Of K/V pages; programs: sequences × key/value heads."""
    splits = num_splits(max(programs, 1))
    if splits == 1:
        return DecodeTactic(1, tile=32, warps=2, stages=4)
    return DecodeTactic(splits, tile=64, warps=4, stages=3)


def latent_tactic(num_sequences: int, num_heads: int) -> DecodeTactic:
    programs = max(num_sequences, 1) * -(-num_heads // 64)
    if num_heads > 16:
        return DecodeTactic(num_splits(2 * programs), tile=64, warps=8, stages=2)
    return DecodeTactic(num_splits(programs), tile=32, warps=4, stages=3)


def sparse_tactic(num_queries: int, num_heads: int) -> DecodeTactic:
    """Of rows chosen one by one."""
    splits = num_splits(2 * max(num_queries, 1) * -(-num_heads // 64))
    return DecodeTactic(splits, tile=64, warps=8, stages=2)


SHORT_ROWS = DecodeTactic(4, tile=64, warps=8, stages=2)  # of the few queries of a step that choose fewer rows


def expert_tactics(num_entries: int, num_slots: int) -> tuple[ExpertTactic, ExpertTactic]:
    """Of the two products of `num_entries` rows over `num_slots` experts; both have the same tile of rows."""
    per_slot = num_entries / num_slots
    if num_entries <= SINGLE_ENTRIES:
        few = ExpertTactic(16, 64, 128, 4, 3, swap=True, tma=True)
        return few, few
    if per_slot <= 20:
        return (
            ExpertTactic(16, 64, 128, 4, 3, swap=True, tma=True),
            ExpertTactic(16, 128, 64, 4, 4, swap=True, tma=True),
        )
    if per_slot <= 96:
        return ExpertTactic(64, 64, 64, 4, 4), ExpertTactic(64, 128, 64, 4, 3, swap=True, tma=True)
    return ExpertTactic(128, 128, 64, 8, 4, tma=True), ExpertTactic(128, 256, 64, 8, 4, tma=True)

"""Contexts of many lengths, one behind the other, cut into equal runs of tiles: the longest one is nobody's alone.

A program attends one run, and leaves a part for each context that it has not the whole of; the parts of a context are
then merged. How many runs there are depends on shapes alone, lengths are read on the device: the launches are the same
in a CUDA graph. Shapes: B sequences, H heads, V value size.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.kernels.launcher import Launcher, power_of_two
from workers.kernels.tactics import RunsTactic

_LEAST_TOKENS = 64  # of a run, unless a tile is larger
_EXTRA_TOKENS = 64  # that a context costs beside its own
_MOST_AT_ONCE = 32  # runs that are merged
_FEW = 512  # sequences times heads, each of many runs: more programs merge them
_HEADS = 4  # that one program merges else: starting programs is what costs


@triton.jit(do_not_specialize=["num_sequences", "most_runs", "runs_each", "each_run"])
def _cut(
    positions_ptr,
    num_sequences,
    most_runs,
    runs_ptr,
    bounds_ptr,
    runs_each,  # of a sequence, if contexts are about as long as each other
    each_run,  # has so many sequences then; one of the two is 1, or both are 0: never
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    BEFORE: tl.constexpr,
    BEHIND: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    gdc_wait()
    each = tl.arange(0, SEQUENCES)
    there = each < num_sequences
    tiles = tl.cdiv((tl.load(positions_ptr + each, mask=there, other=-1) + 1).to(tl.int32), TILE)
    # To begin a context and to end it takes a run time, too, as much as some tiles: they stand before and behind it.
    ends = tl.cumsum(tl.where(there, tiles + BEFORE + BEHIND, 0), 0)
    total = tl.max(ends, 0).to(tl.int64)
    stops = tl.where(there, ends - BEHIND, total)  # of its own tiles, as begins are
    begins = tl.where(there, stops - tiles, total)
    num_runs = tl.minimum(most_runs, tl.cdiv(tl.sum(tiles, 0), LEAST))
    # Cut behind each other, contexts that differ by a token would all end in the middle of runs.
    even = (runs_each > 0) & (8 * tl.max(tiles, 0) * num_sequences <= 9 * tl.sum(tiles, 0))
    runs_each, each_run = tl.maximum(runs_each, 1), tl.maximum(each_run, 1)
    index = tl.program_id(0)
    if index < most_runs:
        run = tl.minimum(index, num_runs - 1).to(tl.int64)
        first, last = (run * total // num_runs).to(tl.int32), ((run + 1) * total // num_runs).to(tl.int32)
        sequence = tl.where(even, index // runs_each * each_run, tl.sum((stops <= first).to(tl.int32), 0))
        # Before the first one where the run has no tiles at all.
        final = tl.where(index < num_runs, tl.sum((begins < last).to(tl.int32), 0) - 1, -1)
        final = tl.where(even, tl.minimum(sequence + each_run, num_sequences) - 1, final)
        first = tl.maximum(first - tl.sum(tl.where(each == sequence, begins, 0), 0), 0)
        until = tl.minimum(last, tl.sum(tl.where(each == final, stops, 0), 0).to(tl.int32))
        until -= tl.sum(tl.where(each == final, begins, 0), 0).to(tl.int32)
        of_first = tl.sum(tl.where(each == sequence, tiles, 0), 0)
        of_final = tl.sum(tl.where(each == final, tiles, 0), 0)
        piece, pieces = index % runs_each, tl.minimum(runs_each, tl.maximum(of_first // LEAST, 1))
        at = runs_ptr + index * 4
        tl.store(at, sequence)
        tl.store(at + 1, tl.where(even & (piece >= pieces), sequence - 1, final))
        tl.store(at + 2, tl.where(even, of_first * piece // pieces, first))
        tl.store(at + 3, tl.where(even, of_final * (piece + 1) // pieces, until))
    else:
        sequence = index - most_runs
        begin = tl.sum(tl.where(each == sequence, begins, 0), 0).to(tl.int64)
        stop = tl.sum(tl.where(each == sequence, stops, 0), 0).to(tl.int64)
        at = bounds_ptr + sequence * 2
        # The last run that starts at a tile or before is the one that has it.
        holds_begin, holds_end = ((begin + 1) * num_runs - 1) // total, (stop * num_runs - 1) // total
        own = sequence // each_run * runs_each
        tl.store(at, tl.where(even, own, holds_begin).to(tl.int32))
        pieces = tl.minimum(runs_each, tl.maximum((stop - begin).to(tl.int32) // LEAST, 1))
        tl.store(at + 1, tl.where(even, own + pieces - 1, holds_end).to(tl.int32))


@triton.jit
def add_parts(lse, values, best, total, acc):
    """More parts, lse [R, H] of base 2 (very small: there is none), values [R, H, V], beside those in best and total
    [H] and acc [H, V]. Returns these."""
    new_best = tl.maximum(best, tl.max(lse, 0))
    shares, shrink = tl.exp2(lse - new_best[None, :]), tl.exp2(best - new_best)
    total = total * shrink + tl.sum(shares, 0)
    acc = acc * shrink[:, None] + tl.sum(values * shares[:, :, None], 0)
    return new_best, total, acc


@triton.jit
def _merge(
    parts_ptr,
    lse_ptr,
    bounds_ptr,
    out_ptr,
    NUM_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    FEATURES: tl.constexpr,
    RUNS: tl.constexpr,
):
    gdc_launch_dependents()
    sequence = tl.program_id(0)
    first, last = tl.load(bounds_ptr + sequence * 2), tl.load(bounds_ptr + sequence * 2 + 1)
    gdc_wait()
    if first == last:
        return
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    features = tl.program_id(2) * FEATURES + tl.arange(0, FEATURES)
    exists = heads < NUM_HEADS
    best = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, FEATURES], tl.float32)
    for start in range(first, last + 1, RUNS):
        runs = start + tl.arange(0, RUNS)
        there = (runs <= last)[:, None] & exists[None, :]
        parts = (runs + sequence).to(tl.int64)[:, None] * NUM_HEADS + heads[None, :]
        lse = tl.load(lse_ptr + parts, mask=there, other=-1e30)
        at = parts_ptr + parts[:, :, None] * SIZE + features[None, None, :]
        values = tl.load(at, mask=there[:, :, None], other=0.0)
        best, total, acc = add_parts(lse, values, best, total, acc)
    at_out = out_ptr + (sequence.to(tl.int64) * NUM_HEADS + heads)[:, None] * SIZE + features[None, :]
    tl.store(at_out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=exists[:, None])


_launch_cut, _launch_merge = Launcher(_cut), Launcher(_merge)


class ContextRuns(NamedTuple):
    """How the contexts of a step are cut, for all its layers. Kernels that follow others closely need not wait for them
    before they read this, and positions and block tables that were there when it was made."""

    positions: Tensor  # [B]
    runs: Tensor  # [runs, 4] int32: first and last sequence, a run's first tile of the one and end in the other
    bounds: Tensor  # [B, 2] int32: the first run of each sequence, and the last
    arrived: Tensor  # [B, programs of a run] int32: parts that are there; 0 between layers
    tactic: RunsTactic


def cut_contexts(positions: Tensor, beside: int, tactic: RunsTactic) -> ContextRuns:
    """positions [B] of the query tokens, which see what is up to and including them. beside: programs of each run, of
    heads that do not share what they read."""
    count = len(positions)
    programs = max(tactic.programs // beside, 1)
    runs_each, each_run = max(programs // count, 1), -(-count // programs)
    most_runs = runs_each * -(-count // each_run)
    if 10 * most_runs < 9 * programs:  # too many programs would have nothing to do
        runs_each, each_run, most_runs = 0, 0, programs
    runs = torch.empty(most_runs, 4, dtype=torch.int32, device=positions.device)
    bounds = torch.empty(count, 2, dtype=torch.int32, device=positions.device)
    arguments = (positions, count, most_runs, runs, bounds, runs_each, each_run)
    extra = _EXTRA_TOKENS // tactic.tile
    constants = {"TILE": tactic.tile, "LEAST": max(_LEAST_TOKENS // tactic.tile, 1)}
    constants |= {"BEFORE": extra // 2, "BEHIND": extra - extra // 2, "SEQUENCES": max(power_of_two(count), 64)}
    _launch_cut((most_runs + count, 1, 1), arguments, constants, num_warps=2)
    # Torch launches this when all ahead has ended, and what comes later comes behind it.
    arrived = torch.zeros(count, beside, dtype=torch.int32, device=positions.device)
    return ContextRuns(positions, runs, bounds, arrived, tactic)


def merge_runs(parts: Tensor, lse: Tensor, out: Tensor, cut: ContextRuns) -> None:
    """parts fp32 [runs + B - 1, H, V] at run + sequence, lse fp32 [runs + B - 1, H], of base 2 -> out [B, H, V], but
    for contexts of one run, which are there."""
    count, num_heads, size = out.shape
    few = count * num_heads <= _FEW
    heads, features = (1, size // 4 if size >= 512 else size) if few else (_HEADS, size)
    at_once = min(max(power_of_two(-(-len(cut.runs) // count)), 2), _MOST_AT_ONCE // heads)
    constants = {"NUM_HEADS": num_heads, "SIZE": size, "HEADS": heads, "FEATURES": features, "RUNS": at_once}
    arguments = (parts, lse, cut.bounds, out)
    grid = (count, -(-num_heads // heads), size // features)
    _launch_merge(grid, arguments, constants, num_warps=4 if heads * features > 128 else 1)

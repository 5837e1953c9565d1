"""From router scores to rows of a grouped product, in Triton. References: workers.moe.routing (which experts), and a
stable sort by expert (which row). No atomics: the order of rows depends on their experts alone.

Shapes: T tokens, E experts, s slots that every token uses (shared experts), k slots per token, s included.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow
from workers.kernels.launcher import Launcher, power_of_two

CHUNK = 1024  # entries that are counted together
_TOKENS = 8  # that one program routes
_PIECE = 64  # entries of a chunk that one program places, where there are several chunks
_CROWD = 24 * CHUNK  # entries, from which on programs of fewer threads are faster: they do not run all at once
_TILES = 16  # that one program describes at once
_COUNTS = 4096  # that one program reads at once


# What differs from step to step is no reason to compile again, here and in all kernels that prompts go through.
@triton.jit(do_not_specialize=["num_tokens"])
def _route(
    logits_ptr,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    num_tokens,
    scale,
    NUM_EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    SHARED: tl.constexpr,
    SIGMOID: tl.constexpr,
    BALANCED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    BEST_OF_GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    follow()
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    experts = tl.arange(0, EXPERTS)
    exists = (tokens < num_tokens)[:, None] & (experts < NUM_EXPERTS)[None, :]
    at = tokens.to(tl.int64)[:, None] * NUM_EXPERTS + experts[None, :]
    logits = tl.load(logits_ptr + at, mask=exists, other=float("-inf"))
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        powers = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = powers / tl.sum(powers, 1)[:, None]
    biased = scores
    if BALANCED:
        biased = scores + tl.load(bias_ptr + experts, mask=experts < NUM_EXPERTS, other=0.0)[None, :]
    biased = tl.where((experts < NUM_EXPERTS)[None, :], biased, float("-inf"))
    if MAX_GROUPS < GROUPS:
        size: tl.constexpr = NUM_EXPERTS // GROUPS
        group_of = experts // size
        # Each expert carries the score of its group.
        group_scores = tl.full([TOKENS, EXPERTS], float("-inf"), tl.float32)
        for group in tl.static_range(GROUPS):
            mine = (group_of == group)[None, :]
            left = tl.where(mine, biased, float("-inf"))
            counting = tl.zeros([TOKENS], tl.float32)
            for _ in tl.static_range(BEST_OF_GROUP):
                best = tl.max(left, 1)
                counting += best
                place = tl.argmax(left, 1)
                left = tl.where(experts[None, :] == place[:, None], float("-inf"), left)
            group_scores = tl.where(mine, counting[:, None], group_scores)
        allowed = tl.zeros([TOKENS, EXPERTS], tl.int32)
        for _ in tl.static_range(MAX_GROUPS):
            winner = tl.argmax(group_scores, 1) // size
            mine = group_of[None, :] == winner[:, None]
            allowed = tl.where(mine, 1, allowed)
            group_scores = tl.where(mine, float("-inf"), group_scores)
        biased = tl.where(allowed == 1, biased, float("-inf"))
    factor = tl.full([TOKENS], 1.0, tl.float32) * scale
    if NORMALIZE:
        total = tl.zeros([TOKENS], tl.float32)
        left = biased
        for _ in tl.static_range(CHOSEN):
            mine = experts[None, :] == tl.argmax(left, 1)[:, None]
            total += tl.sum(tl.where(mine, scores, 0.0), 1)
            left = tl.where(mine, float("-inf"), left)
        factor = scale / (total + 1e-20)
    row: tl.constexpr = CHOSEN + SHARED
    start = tokens.to(tl.int64) * row
    present = tokens < num_tokens
    for i in tl.static_range(CHOSEN):
        place = tl.argmax(biased, 1)
        mine = experts[None, :] == place[:, None]
        weight = tl.sum(tl.where(mine, scores, 0.0), 1)
        biased = tl.where(mine, float("-inf"), biased)
        tl.store(experts_ptr + start + i, place.to(tl.int32), mask=present)
        tl.store(weights_ptr + start + i, weight * factor, mask=present)
    for i in tl.static_range(SHARED):
        tl.store(experts_ptr + start + CHOSEN + i, tl.full([TOKENS], NUM_EXPERTS, tl.int32) + i, mask=present)
        tl.store(weights_ptr + start + CHOSEN + i, tl.full([TOKENS], 1.0, tl.float32), mask=present)


_launch_route = Launcher(_route)


class RouteSpec(NamedTuple):
    """The parts of a routing rule that the kernel is compiled for; see workers.moe.routing.RoutingRule."""

    num_experts: int
    chosen: int
    shared: int
    scale: float
    sigmoid: bool
    balanced: bool
    normalize: bool
    num_groups: int
    max_groups: int
    best_of_group: int


def route(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> tuple[Tensor, Tensor]:
    """logits [T, E] fp32 -> experts [T, k] int32 and weights [T, k] fp32; shared slots E, E + 1, … with weight 1.

    Equal scores go to the lowest expert.
    """
    num_tokens = logits.shape[0]
    row = spec.chosen + spec.shared
    experts = torch.empty(num_tokens, row, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_tokens, row, dtype=torch.float32, device=logits.device)
    arguments = (
        logits,
        logits if bias is None else bias,
        experts,
        weights,
        num_tokens,
        spec.scale,
    )
    constants = {
        "NUM_EXPERTS": spec.num_experts,
        "CHOSEN": spec.chosen,
        "SHARED": spec.shared,
        "SIGMOID": spec.sigmoid,
        "BALANCED": bias is not None,
        "NORMALIZE": spec.normalize,
        "GROUPS": spec.num_groups,
        "MAX_GROUPS": spec.max_groups,
        "BEST_OF_GROUP": min(spec.best_of_group, spec.num_experts // spec.num_groups),
        "EXPERTS": power_of_two(spec.num_experts),
        "TOKENS": _TOKENS,
    }
    _launch_route((-(-num_tokens // _TOKENS), 1, 1), arguments, constants, num_warps=4)
    return experts, weights


@triton.jit
def _count_some(slots_ptr, at, index, num_entries, SLOTS: tl.constexpr, SIZE: tl.constexpr):
    entries = index * SIZE + tl.arange(0, SIZE)
    slots = tl.load(slots_ptr + entries, mask=entries < num_entries, other=SLOTS - 1)
    tl.store(at, tl.histogram(slots, SLOTS))


@triton.jit(do_not_specialize=["num_entries", "num_chunks"])
def _count(
    slots_ptr, counts_ptr, num_entries, num_chunks, SLOTS: tl.constexpr, CHUNK: tl.constexpr, PIECE: tl.constexpr
):
    """Entries of each slot, in each chunk, and behind them in each piece."""
    follow()
    program = tl.program_id(0)
    at = counts_ptr + program * SLOTS + tl.arange(0, SLOTS)
    if program < num_chunks:
        _count_some(slots_ptr, at, program, num_entries, SLOTS, CHUNK)
    else:
        _count_some(slots_ptr, at, program - num_chunks, num_entries, SLOTS, PIECE)


_launch_count = Launcher(_count)


@triton.jit(do_not_specialize=["num_entries", "num_chunks", "max_tiles", "num_slots"])
def _place(
    slots_ptr,
    counts_ptr,
    order_ptr,
    tile_slots_ptr,
    tile_starts_ptr,
    tile_ends_ptr,
    num_entries,
    num_chunks,
    max_tiles,
    num_slots,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    COUNTED: tl.constexpr,  # else there is one chunk, and each program counts it
):
    follow()
    program = tl.program_id(0)
    slots = tl.arange(0, SLOTS)
    before = tl.zeros([SLOTS], tl.int32)
    total = tl.zeros([SLOTS], tl.int32)
    begin = 0
    if COUNTED:
        begin = program * PIECE
        chunk = begin // CHUNK
        each: tl.constexpr = CHUNK // PIECE
        pieces = chunk * each + tl.arange(0, each)
        of_pieces = counts_ptr + (num_chunks + pieces)[:, None] * SLOTS + slots[None, :]
        before += tl.sum(tl.load(of_pieces, mask=(pieces < program)[:, None], other=0), 0)
        for start in range(0, num_chunks, CHUNKS):
            chunks = start + tl.arange(0, CHUNKS)
            at = counts_ptr + chunks[:, None] * SLOTS + slots[None, :]
            counts = tl.load(at, mask=(chunks < num_chunks)[:, None], other=0)
            total += tl.sum(counts, 0)
            before += tl.sum(tl.where((chunks < chunk)[:, None], counts, 0), 0)
    else:
        entries = tl.arange(0, CHUNK)
        total += tl.histogram(tl.load(slots_ptr + entries, mask=entries < num_entries, other=SLOTS - 1), SLOTS)
    total = tl.where(slots < num_slots, total, 0)
    start = tl.cumsum(total, 0) - total
    # Where each entry of the piece goes: the start of its slot, what is counted ahead of it, what stands between.
    mine = program * PIECE + tl.arange(0, PIECE)
    slot = tl.load(slots_ptr + mine, mask=mine < num_entries, other=SLOTS - 1)
    offset = tl.gather(start + before, slot, 0)
    for first in range(begin, program * PIECE + 1, WIDTH):
        others = first + tl.arange(0, WIDTH)
        their_slots = tl.load(slots_ptr + others, mask=others < num_entries, other=SLOTS - 1)
        earlier = (their_slots[None, :] == slot[:, None]) & (others[None, :] < mine[:, None])
        offset += tl.sum(earlier.to(tl.int32), 1)
    tl.store(order_ptr + offset, mine, mask=mine < num_entries)
    # Tiles of TILE rows, none over two slots; those behind the last have slot -1.
    tiles_of = tl.cdiv(total, TILE)
    tiles_until = tl.cumsum(tiles_of, 0)
    for at in range(program * TILES, max_tiles, tl.num_programs(0) * TILES):
        tiles = at + tl.arange(0, TILES)
        owner = tl.sum((tiles_until[None, :] <= tiles[:, None]).to(tl.int32), 1)
        own = tl.minimum(owner, SLOTS - 1)
        row = tl.gather(start, own, 0) + (tiles - tl.gather(tiles_until - tiles_of, own, 0)) * TILE
        until = tl.gather(start + total, own, 0)
        tl.store(tile_slots_ptr + tiles, tl.where(owner < SLOTS, owner, -1), mask=tiles < max_tiles)
        tl.store(tile_starts_ptr + tiles, row, mask=tiles < max_tiles)
        tl.store(tile_ends_ptr + tiles, until, mask=tiles < max_tiles)


_launch_place = Launcher(_place)


class RowPlan(NamedTuple):
    """Rows of a grouped product: entry `order[r]` of [T, k] flat is row r; a tile is rows [start, end) of one slot, at
    most `tile` of them."""

    order: Tensor  # [T * k] int32
    tile_slots: Tensor  # [max tiles] int32, -1: no such tile
    tile_starts: Tensor  # [max tiles] int32
    tile_ends: Tensor  # [max tiles] int32: of the slot
    tile: int


def plan_rows(slots: Tensor, num_slots: int, tile: int) -> RowPlan:
    """slots [T, k] int32, each in [0, num_slots). Stable: rows of a slot are in the order of their entries."""
    num_entries = slots.numel()
    chunks = -(-num_entries // CHUNK)
    width = power_of_two(num_slots + 1)  # the last one counts what is no entry
    max_tiles = min(num_entries, num_slots + num_entries // tile)
    order = torch.empty(num_entries, dtype=torch.int32, device=slots.device)
    # Each of the three begins at a multiple of 16 bytes, whatever their number.
    tiles = torch.empty(3, -(-max_tiles // 4) * 4, dtype=torch.int32, device=slots.device)
    tile_slots, tile_starts, tile_ends = tiles[:, :max_tiles].unbind()
    counts = order
    piece = 16  # entries that one program places
    warps = 4 if num_entries <= _CROWD else 2
    if chunks > 1:
        piece = _PIECE
        pieces = -(-num_entries // piece)
        counts = torch.empty(chunks + pieces, width, dtype=torch.int32, device=slots.device)
        constants = {"SLOTS": width, "CHUNK": CHUNK, "PIECE": piece}
        _launch_count((chunks + pieces, 1, 1), (slots, counts, num_entries, chunks), constants, num_warps=warps)
    arguments = (
        slots,
        counts,
        order,
        tile_slots,
        tile_starts,
        tile_ends,
        num_entries,
        chunks,
        max_tiles,
        num_slots,
    )
    constants = {
        "SLOTS": width,
        "CHUNK": CHUNK,
        "PIECE": piece,
        "WIDTH": piece if chunks > 1 else 256,
        "CHUNKS": min(max(_COUNTS // width, 1), power_of_two(chunks)),
        "TILES": _TILES,
        "TILE": tile,
        "COUNTED": chunks > 1,
    }
    _launch_place((-(-num_entries // piece), 1, 1), arguments, constants, num_warps=warps)
    return RowPlan(order, tile_slots, tile_starts, tile_ends, tile)

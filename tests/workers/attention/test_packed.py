"""Packed attention of encoder–decoder models, with kernels in plain torch, against the plain reference, at odd sizes:
one row, mixed lengths, padding rows, the longest, and NaN wherever nobody wrote."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.headed_cache import BLOCK, HEADS, LAYERS, PROBLEM, SIZE, nan_cache
from workers.attention.encoder_decoder import CrossWriter, ReferenceBackend
from workers.attention.interface import (
    AttentionBatch,
    EncoderBatch,
    FixedGroupMetadata,
    GroupMetadata,
    KvCache,
)
from workers.attention.packed import PackedBackend, Spans, TorchKernels

NUM_BLOCKS = 60
LONGEST = 45
PLAIN = ReferenceBackend(PROBLEM, in_place=False)
PACKED = PackedBackend(PROBLEM, TorchKernels())


def tables(lens: list[int], width: int) -> Tensor:
    """Blocks in no order, the null block behind them."""
    free = iter((torch.randperm(NUM_BLOCKS - 1) + 1).tolist())
    rows = [[next(free) for _ in range(-(-length // BLOCK))] for length in lens]
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def slots(table: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    at = [torch.arange(start, end) for start, end in spans]
    return torch.cat([row[each // BLOCK] * BLOCK + each % BLOCK for row, each in zip(table, at, strict=True)])


def batch_of(cached: list[int], new: list[int], table: Tensor) -> AttentionBatch:
    spans = [(start, start + count) for start, count in zip(cached, new, strict=True)]
    return AttentionBatch(
        num_sequences=len(new),
        num_decodes=new.count(1),
        query_lens=new,
        query_starts=[sum(new[:i]) for i in range(len(new) + 1)],
        context_lens=[end for _, end in spans],
        positions=torch.cat([torch.arange(start, end) for start, end in spans]),
        groups=(GroupMetadata(table, slots(table, spans)),),
        logits_rows=torch.empty(0, dtype=torch.int64),
    )


@pytest.mark.parametrize("lens", [[1], [16], [5, 1, LONGEST, 8], [7] * 5, [*range(1, 31)]])
def test_encoder_inputs(lens: list[int]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, sum(lens), HEADS, SIZE)
    batch = EncoderBatch(lens, torch.arange(sum(lens)))
    for bias in (None, torch.randn(HEADS, 2 * max(lens) - 1)):
        wanted = PLAIN.encoder(batch, 0.5, bias).attend(q, k, v)
        torch.testing.assert_close(PACKED.encoder(batch, 0.5, bias).attend(q, k, v), wanted)


def test_what_does_not_fit_is_refused() -> None:
    batch = EncoderBatch([2, 4], torch.arange(6))
    with pytest.raises(ValueError, match=r"a bias of \(3, 11\) for inputs of up to 4 tokens"):
        PACKED.encoder(batch, 1.0, torch.zeros(HEADS, 11))
    tokens = torch.zeros(5, HEADS, SIZE)
    with pytest.raises(ValueError, match=r"5 packed tokens for encoder inputs of \[2, 4\]"):
        PACKED.encoder(batch, 1.0, None).attend(tokens, tokens, tokens)
    table = torch.ones(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="for 2 sequences; give one of each"):
        PACKED.cross(batch_of([3, 3], [1, 1], table), FixedGroupMetadata(table, [4]), nan_cache(NUM_BLOCKS), "kv")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "steps",
    [
        [([0], [1]), ([1], [1]), ([2], [1])],  # one row
        [([0, 0, 0], [3, 9, 21]), ([3, 9, 21], [1, 1, 1]), ([4, 10, 22], [1, 1, LONGEST - 22])],
        [([0, 0, 0, 0], [1, 6, 6, 5]), ([1, 6, 6, 5], [1, 1, 4, 30])],  # singles beside fresh and cached chunks
    ],
)
def test_own_tokens(steps: list[tuple[list[int], list[int]]], *, with_bias: bool) -> None:
    torch.manual_seed(0)
    caches = nan_cache(NUM_BLOCKS), nan_cache(NUM_BLOCKS)
    table = tables([LONGEST] * len(steps[0][0]), 13)
    bias = torch.randn(HEADS, 100) if with_bias else None
    for cached, new in steps:
        batch = batch_of(cached, new, table)
        plain = PLAIN.own(batch, 0, caches[0], "kv", None if bias is None else bias[:, : max(batch.context_lens)])
        packed = PACKED.own(batch, 0, caches[1], "kv", bias)
        for layer in range(LAYERS):
            q, k, v = torch.randn(3, sum(new), HEADS, SIZE)
            torch.testing.assert_close(packed.attend(layer, q, k, v), plain.attend(layer, q, k, v))
        written = batch.groups[0].slot_mapping
        for layer in range(LAYERS):
            mine, theirs = (
                cache.layer("kv", layer)[written // BLOCK, :, :, written % BLOCK] for cache in (caches[1], caches[0])
            )
            assert torch.equal(mine, theirs) and not mine.isnan().any()


@pytest.mark.parametrize("new", [[1], [1, 1, 1, 1], [1, 1, 3, 17], [2, 5, 2, 4]])
def test_inputs_of_mixed_lengths(new: list[int]) -> None:
    torch.manual_seed(0)
    lens = [LONGEST, 1, 8, 13][: len(new)]
    table, cache = tables(lens, 12), nan_cache(NUM_BLOCKS)
    packed = EncoderBatch(lens, slots(table, [(0, length) for length in lens]))
    writers = CrossWriter(packed, cache, "kv"), PACKED.writer(packed, written := nan_cache(NUM_BLOCKS), "kv")
    for layer in range(LAYERS):
        k, v = torch.randn(2, sum(lens), HEADS, SIZE)
        for writer in writers:
            writer.write(layer, k, v)
    assert torch.equal(written.pages("kv").nan_to_num(7), cache.pages("kv").nan_to_num(7))
    batch = batch_of([0] * len(new), new, table)
    q = torch.randn(sum(new), HEADS, SIZE)
    fixed = FixedGroupMetadata(table, lens)
    for layer in range(LAYERS):
        wanted = PLAIN.cross(batch, fixed, cache, "kv").attend(layer, q)
        assert not wanted.isnan().any()
        torch.testing.assert_close(PACKED.cross(batch, fixed, cache, "kv").attend(layer, q), wanted)


def test_single_queries_look_at_lengths_of_the_device_alone() -> None:
    """Host lists that say otherwise, and rows that pad a step: they see the first slot of the null block."""
    torch.manual_seed(0)
    lens, rows = [LONGEST, 1, 8], 5
    table = torch.cat((tables(lens, 12), torch.zeros(2, 12, dtype=torch.int64)))
    cache = nan_cache(NUM_BLOCKS)
    for row, length in enumerate(lens):
        for at in range(length):
            cache.pages("kv")[table[row, at // BLOCK], :, :, :, at % BLOCK] = torch.randn(LAYERS, 2, HEADS, SIZE)
    clean = KvCache({"kv": cache.pages("kv").nan_to_num()})  # the reference relies on numbers behind the tokens
    q, k, v = torch.randn(3, rows, HEADS, SIZE)
    device_lens = torch.tensor([*lens, 1, 1])
    batch = batch_of([0] * rows, [1] * rows, table)
    truth = FixedGroupMetadata(table[:3], lens)
    wanted = PLAIN.cross(batch_of([0] * 3, [1] * 3, table[:3]), truth, clean, "kv").attend(1, q[:3])
    fixed = FixedGroupMetadata(table, [1] * rows, device_lens)
    out = PACKED.cross(batch, fixed, cache, "kv").attend(1, q)
    torch.testing.assert_close(out[:3], wanted)
    assert (out[3:] == 0).all()
    own = batch_of([length - 1 for length in lens], [1] * 3, table[:3])
    wanted = PLAIN.own(own, 0, clean, "kv", None).attend(1, q[:3], k[:3], v[:3])
    positions = torch.cat((own.positions, torch.zeros(2, dtype=torch.int64)))
    slot_mapping = torch.cat((own.groups[0].slot_mapping, torch.zeros(2, dtype=torch.int64)))
    static = AttentionBatch(
        num_sequences=rows,
        num_decodes=rows,
        query_lens=[1] * rows,
        query_starts=list(range(rows + 1)),
        context_lens=[1] * rows,
        positions=positions,
        groups=(GroupMetadata(table, slot_mapping),),
        logits_rows=torch.arange(rows),
    )
    torch.testing.assert_close(PACKED.own(static, 0, cache, "kv", None).attend(1, q, k, v)[:3], wanted)


def covered(spans: Spans) -> list[tuple[int, int]]:
    """(sequence, query) of every query that a tile has."""
    lens = spans.table[:, 1].tolist()
    return sorted(
        (sequence, query)
        for sequence, first in spans.tiles.tolist()
        for query in range(first, min(first + spans.tile, lens[sequence]))
    )


@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 200))
def test_tiles_have_every_query_once(lens: list[int], num_padding: int, more_tokens: int) -> None:
    starts = [sum(lens[:i]) for i in range(len(lens))]
    keys = [length + 3 for length in lens]
    of_host = Spans.of(starts, lens, keys, torch.device("cpu"))
    padded = torch.tensor([*zip(starts, lens, strict=True), *[(0, 0)] * num_padding])
    seen = torch.tensor(keys + [7] * num_padding)
    of_device = Spans.on_device(padded, seen, sum(lens) + more_tokens)
    wanted = [(sequence, query) for sequence, length in enumerate(lens) for query in range(length)]
    assert covered(of_host) == covered(of_device) == wanted
    assert of_host.table.tolist() == of_device.table[: len(lens)].tolist()
    assert of_host.table.dtype == of_device.table.dtype == of_host.tiles.dtype == of_device.tiles.dtype == torch.int32
    assert of_device.tiles[:, 0].min() >= 0 and of_device.tiles[:, 1].min() >= 0

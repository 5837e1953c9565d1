"""Attention within and to encoder inputs against itself written out: one query, one head and one key at a time."""

import math

import pytest
import torch
from torch import Tensor

from tests.support.headed_cache import BLOCK, HEADS, LAYERS, PROBLEM, SIZE, nan_cache
from workers.attention.block_parts import BlockParts
from workers.attention.encoder_decoder import CrossStep, CrossWriter, EncoderStep, SelfAttention
from workers.attention.interface import (
    AttentionBatch,
    EncoderBatch,
    FixedGroupMetadata,
    GroupMetadata,
)
from workers.attention.relative_bias import bidirectional_bias, causal_bias, distance_buckets, windows

NUM_BLOCKS = 30
LENS = [5, 1, 8]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def written_out(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """One query [H, D] over keys and values [C, H, D], bias [H, C] -> [H * D]."""
    rows = []
    for head, query in enumerate(q.double()):
        scores = keys[:, head].double() @ query * PROBLEM.scale
        weights = torch.softmax(scores if bias is None else scores + bias[head], 0)
        rows.append(weights @ values[:, head].double())
    return torch.cat(rows).float()


def slots(table: list[int], start: int, end: int) -> list[int]:
    return [table[at // BLOCK] * BLOCK + at % BLOCK for at in range(start, end)]


def decoder_batch(query_lens: list[int], contexts: list[int], groups: tuple[GroupMetadata, ...] = ()) -> AttentionBatch:
    starts = [sum(query_lens[:i]) for i in range(len(query_lens) + 1)]
    return AttentionBatch(
        num_sequences=len(query_lens),
        num_decodes=sum(1 for count in query_lens if count == 1),
        query_lens=query_lens,
        query_starts=starts,
        context_lens=contexts,
        positions=torch.empty(0, dtype=torch.int64),
        groups=groups,
        logits_rows=torch.empty(0, dtype=torch.int64),
    )


def test_every_token_of_an_input_sees_all_of_it_and_nothing_else() -> None:
    q, k, v = (draw(sum(LENS), HEADS, SIZE, seed=seed) for seed in range(3))
    bias = draw(HEADS, 15)
    batch = EncoderBatch(LENS, torch.arange(sum(LENS)))
    for given in (None, bias):
        out = EncoderStep(batch, PROBLEM.scale, given).attend(q, k, v)
        for start, length in zip(batch.starts, LENS, strict=True):
            for at in range(length):
                own = None if given is None else given[:, 7 - at : 7 - at + length]
                wanted = written_out(q[start + at], k[start : start + length], v[start : start + length], own)
                torch.testing.assert_close(out[start + at], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("query_lens", [[1, 1, 1], [1, 3, 2], [4, 2, 5]])
def test_every_decoder_query_sees_the_whole_input_whatever_its_own_context(
    query_lens: list[int], *, in_place: bool
) -> None:
    """Never causal: the first query of a chunk sees the last token of the input, which is longer than its context."""
    cache, tables = nan_cache(NUM_BLOCKS), [[7, 3], [9], [2, 8]]
    batch = EncoderBatch(LENS, torch.tensor([s for t, n in zip(tables, LENS, strict=True) for s in slots(t, 0, n)]))
    writer = CrossWriter(batch, cache, "kv")
    kept = [(draw(sum(LENS), HEADS, SIZE, seed=2 * i), draw(sum(LENS), HEADS, SIZE, seed=9 + i)) for i in range(LAYERS)]
    for layer, (k, v) in enumerate(kept):
        writer.write(layer, k, v)
    table = torch.tensor([[7, 3], [9, 0], [2, 8]])
    fixed = FixedGroupMetadata(table, LENS)
    step = CrossStep(PROBLEM, decoder_batch(query_lens, query_lens), fixed, cache, "kv", in_place=in_place)
    q = draw(sum(query_lens), HEADS, SIZE, seed=5)
    for layer, (k, v) in enumerate(kept):
        out = step.attend(layer, q)
        row = 0
        for start, length, count in zip(batch.starts, LENS, query_lens, strict=True):
            for _ in range(count):
                wanted = written_out(q[row], k[start : start + length], v[start : start + length])
                torch.testing.assert_close(out[row], wanted, rtol=1e-5, atol=1e-5)
                row += 1


def test_sequences_with_one_input_read_its_blocks_together() -> None:
    """Beside others, in blocks that stand side by side or apart, in any order, and none of them full."""
    pages = torch.full((40, LAYERS, 2, HEADS, BLOCK, SIZE), math.nan)
    tables, lens = [[7, 8, 9], [11], [3, 2, 12, 30], [7, 8, 9], [20, 21], [7, 8, 9], [22]], [10, 1, 16, 10, 5, 10, 3]
    for table in tables:
        pages[table] = draw(len(table), LAYERS, 2, HEADS, BLOCK, SIZE, seed=table[0])
    q = draw(len(lens), HEADS, SIZE)
    bias = draw(HEADS, max(lens))
    for given in (None, bias):
        parts = BlockParts(pages, [[*table, 0] for table in tables], lens, scale=PROBLEM.scale, bias=given)
        for layer in range(LAYERS):
            out = parts.attend(layer, q)
            for row, (table, length) in enumerate(zip(tables, lens, strict=True)):
                keys, values = pages[table, layer].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]  # [C, H, D]
                own = None if given is None else given[:, :length].flip(1)
                wanted = written_out(q[row], keys, values, own)
                torch.testing.assert_close(out[row].flatten(), wanted, rtol=1e-5, atol=1e-5)


def test_lengths_are_never_guessed() -> None:
    with pytest.raises(ValueError, match="encoder lengths \\[\\] for 6 tokens; give one of each"):
        EncoderBatch([], torch.arange(6))
    with pytest.raises(ValueError, match="encoder lengths \\[3, 2\\] for 6 tokens"):
        EncoderBatch([3, 2], torch.arange(6))
    with pytest.raises(ValueError, match="encoder lengths \\[6, 0\\] for 6 tokens"):
        EncoderBatch([6, 0], torch.arange(6))
    batch, table = decoder_batch([1, 1], [4, 4]), torch.ones(2, 1, dtype=torch.int64)
    for lens in ([], [4], [4, 0]):
        with pytest.raises(ValueError, match="for 2 sequences; give one of each"):
            CrossStep(PROBLEM, batch, FixedGroupMetadata(table, lens), nan_cache(NUM_BLOCKS), "kv", in_place=True)
    encoder = EncoderBatch([2, 4], torch.arange(6))
    with pytest.raises(ValueError, match="a bias of \\(3, 11\\) for inputs of up to 4 tokens"):
        EncoderStep(encoder, 1.0, torch.zeros(HEADS, 11))
    tokens = draw(5, HEADS, SIZE)
    with pytest.raises(ValueError, match="5 packed tokens for encoder inputs of \\[2, 4\\]"):
        EncoderStep(encoder, 1.0).attend(tokens, tokens, tokens)


def test_buckets_of_distances() -> None:
    """Of 8: four exact ones, then ever wider ones up to 32, beyond which all share the last."""
    buckets = distance_buckets(torch.arange(40), 8, 32).tolist()
    assert buckets[:5] == [0, 1, 2, 3, 4] and buckets == sorted(buckets)
    assert [buckets.count(number) for number in range(4, 8)] == [3, 5, 8, 20]
    table = draw(16, HEADS)
    both = windows(bidirectional_bias(table, 6, 32), 6)
    assert torch.equal(windows(bidirectional_bias(table, 9, 32), 6), both)
    for query in range(6):
        for key in range(6):
            number = buckets[abs(key - query)] + (8 if key > query else 0)
            assert torch.equal(both[:, query, key], table[number])
    before = causal_bias(table[:8], 40, 32)
    assert all(torch.equal(before[:, distance], table[buckets[distance]]) for distance in range(40))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_causal_bias_in_fresh_cached_chunked_and_single_steps(*, in_place: bool) -> None:
    """By how far the key stands before its query, sized by the longest context and not by the packed tokens."""
    cache, tables = nan_cache(NUM_BLOCKS), [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    lengths = [9, 12, 6]
    bias = draw(HEADS, 12)
    q, k, v = ([draw(n, HEADS, SIZE, seed=10 * seed + n) for n in lengths] for seed in range(3))
    done = [0, 0, 0]
    backend = SelfAttention(PROBLEM, in_place=in_place)
    for counts in ([3, 5, 2], [1, 1, 1], [1, 4, 2], [1, 1, 1], [3, 1, 0]):
        order = sorted((i for i, count in enumerate(counts) if count), key=lambda i: counts[i] != 1)
        ends = [done[i] + counts[i] for i in order]
        spans = [(i, done[i], end) for i, end in zip(order, ends, strict=True)]
        mapping = torch.tensor([slot for i, start, end in spans for slot in slots(tables[i], start, end)])
        group = GroupMetadata(torch.tensor([tables[i] for i in order]), mapping)
        batch = decoder_batch([counts[i] for i in order], ends, (group,))
        step = backend.begin(batch, 0, cache, "kv", bias[:, : max(ends)])
        now = [torch.cat([part[i][start:end] for i, start, end in spans]) for part in (q, k, v)]
        out = step.attend(0, *now)
        row = 0
        for i, start, end in spans:
            for at in range(start, end):
                own = bias[:, : at + 1].flip(1)
                wanted = written_out(q[i][at], k[i][: at + 1], v[i][: at + 1], own)
                torch.testing.assert_close(out[row], wanted, rtol=1e-5, atol=1e-5)
                row += 1
            done[i] = end
    assert done == [9, 12, 6]

"""Which sequences share a call, which blocks they gather, and what each token sees."""

import pytest
import torch

from workers.attention.bucketing import (
    MAX_BUCKETS,
    MIN_BUCKET_SEQUENCES,
    bucket_table,
    buckets_by_length,
    chunk_mask,
    clear_started,
)
from workers.attention.interface import AttentionBatch


def batch(contexts: list[int], new: list[int]) -> AttentionBatch:
    starts = [0]
    for count in new:
        starts.append(starts[-1] + count)
    nothing = torch.empty(0, dtype=torch.int64)
    return AttentionBatch(
        num_sequences=len(contexts),
        num_decodes=new.count(1),
        query_lens=new,
        query_starts=starts,
        context_lens=contexts,
        positions=nothing,
        groups=(),
        logits_rows=nothing,
    )


@pytest.mark.parametrize("count", [0, 1, MIN_BUCKET_SEQUENCES, 2 * MIN_BUCKET_SEQUENCES + 1, 100])
def test_buckets_are_runs_of_the_sorted_sequences(count: int) -> None:
    contexts = torch.randint(1, 50, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    runs = buckets_by_length(contexts, range(count))
    flat = [sequence for run in runs for sequence in run]
    assert sorted(flat) == list(range(count))
    assert [contexts[sequence] for sequence in flat] == sorted(contexts)
    assert len(runs) <= MAX_BUCKETS and all(runs)
    assert len(runs) <= 1 or min(map(len, runs)) >= MIN_BUCKET_SEQUENCES


def test_shorter_sequences_repeat_their_own_first_block() -> None:
    table = torch.tensor([[7, 0, 0], [3, 4, 5], [8, 9, 6]])
    context, blocks, mask = bucket_table([2, 9], table[:2], 4, torch.float32)
    assert context == 9 and blocks.tolist() == [[7, 7, 7], [3, 4, 5]]
    assert mask is not None and mask.shape == (2, 1, 1, 9)
    assert (mask[0, 0, 0] == 0).tolist() == [True] * 2 + [False] * 7
    assert bool((mask[1] == 0).all()) and mask[0, 0, 0, 2] == float("-inf")
    assert bucket_table([9, 9], table[1:], 4, torch.float32).mask is None


def test_tokens_of_a_chunk_see_what_is_cached_and_themselves() -> None:
    mask = chunk_mask(2, 5, torch.bfloat16, torch.device("cpu"))
    assert mask.dtype == torch.bfloat16
    assert (mask == 0).tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5]


def test_only_blocks_that_start_now_and_stay_open_are_cleared() -> None:
    table = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    pages = torch.full((9, 4), float("nan"))
    # Goes on in block 2; starts block 4; fills block 6; starts block 7 and leaves it open.
    clear_started(batch([7, 5, 8, 3], [1, 1, 4, 3]), table, pages, 4)
    assert [block for block in range(9) if bool((pages[block] == 0).all())] == [4, 7]

"""Stop conditions, hashes and the order of service."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.hashing import block_hashes
from cluster.request import FinishReason, RequestKey, SamplingParams
from tests.support.engine_builders import ROOT
from workers.engine.sequence import Sequence, SequenceQueue, SequenceStatus

EOS = frozenset({0})


def sequence(tokens: list[int], *, id: int = 1, priority: int = 0, num_prompt: int | None = None, **options: object):
    params = SamplingParams(**options)  # type: ignore[arg-type]
    prompt = len(tokens) if num_prompt is None else num_prompt
    seq = Sequence(id, RequestKey("r", 0), tokens, prompt, params, arrival=id, priority=priority)
    seq.max_total_tokens = prompt + params.max_tokens
    return seq


def test_ends_at_max_tokens_counted_over_all_attempts() -> None:
    seq = sequence([5, 6, 7, 8], num_prompt=2, max_tokens=4)  # two emitted before
    assert seq.accept(9, EOS) is None
    assert seq.num_emitted == 3
    assert seq.accept(9, EOS) is FinishReason.LENGTH
    assert seq.tokens == [5, 6, 7, 8, 9, 9]


def test_eos_and_stop_tokens_end_it_but_not_before_min_tokens() -> None:
    seq = sequence([1], max_tokens=9, min_tokens=3, stop_token_ids=(7,))
    assert [seq.accept(token, EOS) for token in (0, 7, 0)] == [None, None, FinishReason.STOP]
    assert sequence([1], max_tokens=9, stop_token_ids=(7,)).accept(7, EOS) is FinishReason.STOP


def test_ignored_eos_is_a_token_like_others_stop_tokens_are_not() -> None:
    seq = sequence([1], max_tokens=9, ignore_eos=True, stop_token_ids=(7,))
    assert [seq.accept(token, EOS) for token in (0, 7)] == [None, FinishReason.STOP]


def test_stop_wins_over_length_on_the_last_token() -> None:
    assert sequence([1], max_tokens=1).accept(0, EOS) is FinishReason.STOP


def test_source_sequence_ends_after_one_token() -> None:
    seq = sequence([1, 2], max_tokens=9)
    seq.stop_after_first = True
    assert seq.accept(4, EOS) is FinishReason.LENGTH


@given(tokens=st.lists(st.integers(0, 99), max_size=40), steps=st.lists(st.integers(0, 10)), known=st.integers(0, 3))
def test_hashes_extended_piecewise_are_those_of_the_whole(tokens: list[int], steps: list[int], known: int) -> None:
    whole = block_hashes(ROOT, tokens, 4)
    seq = sequence(tokens)
    seq.hashes = whole[:known]
    for step in steps:
        seq.extend_hashes(ROOT, min(step, len(tokens) // 4), 4)
        assert seq.hashes == whole[: len(seq.hashes)]
    seq.extend_hashes(ROOT, len(tokens) // 4, 4)
    assert seq.hashes == whole


def test_own_chain_root_replaces_the_schedulers() -> None:
    seq = sequence(list(range(8)))
    seq.chain_root = b"salted".ljust(16)
    seq.extend_hashes(ROOT, 2, 4)
    assert seq.hashes == block_hashes(b"salted".ljust(16), range(8), 4)


@pytest.mark.parametrize(
    ("start", "end"),
    [("FINISHED", "WAITING"), ("FINISHED", "RUNNING"), ("RUNNING", "PULLING"), ("PULLING", "PULLING")],
)
def test_undrawn_transitions_are_bugs(start: str, end: str) -> None:
    seq = sequence([1])
    seq.status = SequenceStatus[start]
    with pytest.raises(AssertionError, match=f"{start} -> {end}"):
        seq.enter(SequenceStatus[end])


@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), max_size=30))
def test_queue_serves_priorities_then_arrivals(entries: list[tuple[int, bool]]) -> None:
    queue = SequenceQueue()
    everyone = [sequence([1], id=i, priority=priority) for i, (priority, _) in enumerate(entries)]
    for seq in reversed(everyone):
        queue.insert(seq)
    kept = [seq for seq, (_, stays) in zip(everyone, entries, strict=True) if stays]
    for seq in everyone:
        if seq not in kept:
            queue.remove(seq)
    assert list(queue) == sorted(kept, key=lambda seq: (-seq.priority, seq.arrival))
    assert list(reversed(queue)) == list(queue)[::-1]
    assert queue.head() is next(iter(queue), None)
    with pytest.raises(AssertionError, match="not queued"):
        queue.remove(sequence([1], id=99))

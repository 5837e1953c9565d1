from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import WorkerFailed
from cluster.request import FinishReason
from tests.support.engines import TinyEngine, limits


def prompts(count: int, *, shortest: int = 1, longest: int = 40, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(97) for _ in range(draw.randint(shortest, longest))] for _ in range(count)]


def test_ragged_prompts_in_one_batch_give_what_each_gives_without_a_cache() -> None:
    tiny = TinyEngine()
    given_ = prompts(8)
    sequences = [tiny.add(prompt, max_tokens=20) for prompt in given_]
    tiny.run()
    for prompt, seq in zip(given_, sequences, strict=True):
        assert tiny.emitted(seq) == tiny.model.greedy(prompt, 20)
        assert tiny.finish(seq) is FinishReason.LENGTH
    assert max(batch.num_decodes for batch in tiny.model.batches) == 8
    tiny.blocks.check_integrity()


def test_chunks_give_the_same_tokens_as_whole_prompts() -> None:
    tiny = TinyEngine(scheduler_limits=limits(max_batched_tokens=12, max_sequences=8, chunk_tokens=8))
    given_ = prompts(6, shortest=30, longest=45)
    sequences = [tiny.add(prompt, max_tokens=8) for prompt in given_]
    tiny.run()
    for prompt, seq in zip(given_, sequences, strict=True):
        assert tiny.emitted(seq) == tiny.model.greedy(prompt, 8)
        assert sum(chunk.seq is seq for outcome in tiny.outcomes for chunk in outcome.chunks) >= 3
    mixed = [batch for batch in tiny.model.batches if 0 < batch.num_decodes < batch.num_sequences]
    assert mixed, "chunks and decodes never shared a step"


def test_a_prefix_hit_gives_the_same_tokens_as_a_fresh_prompt() -> None:
    tiny = TinyEngine()
    shared = prompts(1, shortest=24, longest=24)[0]
    first = tiny.add([*shared, 5, 6], max_tokens=6)
    tiny.run()
    second = tiny.add([*shared, 9, 8, 7], max_tokens=6)
    tiny.run()
    assert first.prefix_hit_tokens == 0
    assert second.prefix_hit_tokens == 24
    assert tiny.emitted(second) == tiny.model.greedy([*shared, 9, 8, 7], 6)


def test_preempted_sequences_go_on_with_the_same_tokens() -> None:
    tiny = TinyEngine(num_blocks=20, scheduler_limits=limits(max_sequences=6))
    given_ = prompts(6, shortest=8, longest=16)
    sequences = [tiny.add(prompt, max_tokens=30) for prompt in given_]
    tiny.run()
    assert sum(seq.num_preemptions for seq in sequences) > 0
    for prompt, seq in zip(given_, sequences, strict=True):
        assert tiny.emitted(seq) == tiny.model.greedy(prompt, 30)
    assert tiny.runner.num_sequences <= 6


def test_seeded_draws_are_the_same_alone_in_a_batch_in_chunks_and_after_replay() -> None:
    given_ = prompts(7, shortest=10, longest=30)
    options = {"temperature": 1.5, "top_p": 0.95, "max_tokens": 16}
    batch = TinyEngine()
    sequences = [batch.add(prompt, seed=i, sample=i % 2, **options) for i, prompt in enumerate(given_)]
    batch.run()
    together = [batch.emitted(seq) for seq in sequences]
    assert len({token for tokens in together for token in tokens}) > 20
    for i, prompt in enumerate(given_):
        alone = TinyEngine(scheduler_limits=limits(chunk_tokens=4, max_batched_tokens=16))
        whole = alone.add(prompt, seed=i, sample=i % 2, **options)
        alone.run()
        assert alone.emitted(whole) == together[i]
        replayed = alone.add([*prompt, *together[i][:9]], num_prompt=len(prompt), seed=i, sample=i % 2, **options)
        alone.run()
        assert alone.emitted(replayed) == together[i][9:]


def test_min_tokens_keeps_the_end_out_of_the_draw() -> None:
    tiny = TinyEngine(eos_token_ids=frozenset(range(0, 97, 2)))
    prompt = [5, 6, 7]
    early = tiny.add(prompt, max_tokens=30, ignore_eos=False, temperature=2.0)
    late = tiny.add(prompt, max_tokens=30, ignore_eos=False, temperature=2.0, min_tokens=12, stop_token_ids=(11,))
    tiny.run()
    assert tiny.finish(early) is FinishReason.STOP
    assert len(tiny.emitted(early)) < 12
    first = tiny.emitted(late)[:12]
    assert len(first) == 12
    assert all(token % 2 and token != 11 for token in first)


def test_what_one_sequence_must_not_draw_does_not_stick_to_its_slot() -> None:
    tiny = TinyEngine()
    favourite = tiny.model.greedy([5, 6, 7], 1)[0]
    before = tiny.add([5, 6, 7], max_tokens=3, min_tokens=3, stop_token_ids=(favourite,))
    tiny.run()
    after = tiny.add([5, 6, 7], max_tokens=3, min_tokens=3)
    tiny.run()
    assert favourite not in tiny.emitted(before)
    assert tiny.emitted(after) == tiny.model.greedy([5, 6, 7], 3)


def test_a_raising_step_ends_its_sequences_and_nothing_else() -> None:
    tiny = TinyEngine(scheduler_limits=limits(max_sequences=4))
    tiny.model.poison = 96
    given_ = [[1, 2, 3], [4, 5], [7, 8, 9, 96]]
    victims = [tiny.add(prompt) for prompt in given_]
    outcome = tiny.step()
    assert outcome is not None
    assert outcome.failed == victims
    assert isinstance(outcome.error, WorkerFailed) and "token 96" in str(outcome.error)
    assert isinstance(outcome.error.__cause__, RuntimeError)
    assert not outcome.tokens and not outcome.finished and not outcome.chunks
    assert all(seq.is_finished for seq in victims)
    assert not tiny.engine.has_work
    counts = tiny.blocks.counts(0)
    assert counts.free == 256 and counts.cached == 0  # what the failed step may have written is not to be hit
    tiny.scheduler.check_integrity()

    after = tiny.add([1, 2, 3, 4, 5], max_tokens=10)
    tiny.run()
    assert tiny.emitted(after) == tiny.model.greedy([1, 2, 3, 4, 5], 10)
    assert tiny.engine.num_failed_steps == 1
    assert tiny.engine.num_failed_in_a_row == 0
    assert tiny.runner.num_sequences <= 1  # the rank forgot the victims


def test_a_sequence_that_sits_the_failed_step_out_goes_on() -> None:
    tiny = TinyEngine(scheduler_limits=limits(max_batched_tokens=8, max_sequences=4, chunk_tokens=8))
    tiny.model.poison = 96
    bad = tiny.add([96, *range(7)])
    waiting = tiny.add(list(range(8, 20)), max_tokens=5)
    outcome = tiny.step()
    assert outcome is not None and outcome.failed == [bad]
    tiny.run()
    assert tiny.emitted(waiting) == tiny.model.greedy(list(range(8, 20)), 5)


def test_an_aborted_sequence_is_forgotten_by_the_rank() -> None:
    tiny = TinyEngine()
    kept, dropped = tiny.add([1, 2, 3], max_tokens=6), tiny.add([4, 5, 6], max_tokens=6)
    tiny.step()
    assert tiny.runner.num_sequences == 2
    tiny.scheduler.abort(dropped)
    tiny.step()
    assert tiny.runner.num_sequences == 1
    tiny.run()
    assert tiny.emitted(kept) == tiny.model.greedy([1, 2, 3], 6)


def test_idle_and_source_steps() -> None:
    tiny = TinyEngine()
    assert not tiny.engine.has_work
    assert tiny.engine.step() is None  # legal, and a sign of life
    assert tiny.engine.num_steps == 1
    source = tiny.add([1, 2, 3, 4, 5], stop_after_first=True)
    outcome = tiny.step()
    assert outcome is not None and outcome.finished == [source]
    assert source.block_tables[0], "a finished source keeps its blocks until the next step, to be leased"
    tiny.step()
    assert not source.block_tables or not source.block_tables[0]
    assert tiny.emitted(source) == tiny.model.greedy([1, 2, 3, 4, 5], 1)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    num_blocks=st.integers(14, 40),
    chunk_tokens=st.integers(1, 20),
    max_sequences=st.integers(1, 5),
    poison_at=st.none() | st.integers(0, 5),
)
def test_whatever_is_scheduled_the_tokens_are_those_without_a_cache(
    seed: int, num_blocks: int, chunk_tokens: int, max_sequences: int, poison_at: int | None
) -> None:
    tiny = TinyEngine(
        num_blocks=num_blocks,
        scheduler_limits=limits(max_batched_tokens=24, max_sequences=max_sequences, chunk_tokens=chunk_tokens),
    )
    given_ = prompts(6, longest=24, seed=seed)
    if poison_at is not None:
        given_[poison_at].append(200)  # no such row: the model raises
    draw = random.Random(seed)
    sequences = [tiny.add(prompt, max_tokens=draw.randint(1, 20)) for prompt in given_]
    tiny.run()
    failed = {id(seq) for outcome in tiny.outcomes for seq in outcome.failed}
    for prompt, seq in zip(given_, sequences, strict=True):
        emitted = tiny.emitted(seq)
        if 200 in prompt:
            assert id(seq) in failed and not emitted
        else:
            assert emitted == tiny.model.greedy(prompt, len(emitted))
            assert id(seq) in failed or len(emitted) == seq.params.max_tokens
    tiny.scheduler.check_integrity()

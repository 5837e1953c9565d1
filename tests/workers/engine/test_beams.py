"""Beam search in whole engines, against transformers: texts, their order and their scores, in fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import pytest

from cluster.errors import InvalidRequest, RequestTooLong
from cluster.request import Beams, EarlyStopping, Grammar, GrammarKind, Hypothesis, SamplingParams
from tests.support.beam_searches import searching, transformers_finds
from tests.support.checkpoints import checkpoint, ragged_prompts
from tests.support.encoder_decoders import Text, texts
from tests.support.engines import LoadedEngine, limits
from tests.support.families import ENCODER_DECODERS, VOCAB_SIZE
from workers.engine.overlap import OverlappedEngine
from workers.engine.sequence import NOTHING_FORCED, ForcedTokens, Sequence
from workers.models.loader import load

LIMITS = replace(
    limits(max_batched_tokens=40, max_sequences=12, max_model_len=200, chunk_tokens=8, max_encoder_tokens=80),
    vocab_size=VOCAB_SIZE,
)
ENDS = tuple(range(5, VOCAB_SIZE, 9))
WAYS = [
    searching(4, length_penalty=0.6, early_stopping=EarlyStopping.AT_ONCE, max_tokens=12, stop_token_ids=ENDS),
    searching(4, length_penalty=2.0, early_stopping=EarlyStopping.IMPOSSIBLE, max_tokens=12, stop_token_ids=ENDS),
    searching(3, num_returned=2, length_penalty=-0.5, max_tokens=14, stop_token_ids=ENDS[:3], min_tokens=4),
    searching(4, max_tokens=10, no_repeat_ngram_size=2),
    searching(2, max_tokens=1),
    searching(5, num_returned=1, length_penalty=0.0, early_stopping=EarlyStopping.IMPOSSIBLE, stop_token_ids=ENDS),
]


def engine(family: str, *, num_blocks: int = 400) -> LoadedEngine:
    encodes = family in ENCODER_DECODERS
    return LoadedEngine(
        load(checkpoint(family)),
        num_blocks=num_blocks,
        num_fixed_blocks=200,
        block_size=4,
        scheduler_limits=LIMITS if encodes else replace(LIMITS, max_encoder_tokens=0),
    )


def wanted_texts(family: str, count: int) -> list[Text]:
    if family in ENCODER_DECODERS:
        return texts(family, count)
    return [Text((), tuple(prompt)) for prompt in ragged_prompts(count, longest=20, seed=3)]


def add(loaded: LoadedEngine, text: Text, params: SamplingParams, forced: ForcedTokens = NOTHING_FORCED) -> Sequence:
    seq = loaded.sequence(text.prompt, params, encoder_tokens=text.source, forced=forced)
    loaded.scheduler.add(seq)
    return seq


def found(loaded: LoadedEngine, seq: Sequence) -> tuple[Hypothesis, ...]:
    (hypotheses,) = [each.hypotheses for outcome in loaded.outcomes for each in outcome.searches if each.seq is seq]
    return hypotheses


def expect_equal(family: str, loaded: LoadedEngine, runs: SequenceOf[tuple[Text, Sequence]]) -> set[int]:
    seen: set[int] = set()
    for text, seq in runs:
        ours, theirs = found(loaded, seq), transformers_finds(family, text, seq.params, seq.forced)
        assert [each.token_ids for each in ours] == [each.token_ids for each in theirs], f"{text}: {seq.params}"
        assert [each.score for each in ours] == pytest.approx([each.score for each in theirs], rel=1e-4, abs=1e-3)
        seen.update(token for each in ours for token in each.token_ids)
    return seen


def expect_nothing_held(loaded: LoadedEngine) -> None:
    loaded.scheduler.check_integrity()
    loaded.blocks.clear_cache()
    for group, capacity in enumerate(loaded.blocks.groups):
        assert loaded.blocks.counts(group).free == capacity.num_blocks, capacity.name


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_texts_order_and_scores(family: str) -> None:
    """All ways at once, beside greedy rows, in a pool that is too small for all of them; then the ranks know nobody."""
    loaded = engine(family, num_blocks=27)
    wanted = wanted_texts(family, 12)
    runs = [(text, add(loaded, text, WAYS[i % len(WAYS)])) for i, text in enumerate(wanted)]
    greedy = [add(loaded, text, SamplingParams(max_tokens=6, ignore_eos=True)) for text in wanted[:6]]
    num_interrupted = 0
    while loaded.engine.has_work:
        outcome = loaded.step()
        loaded.scheduler.check_integrity()
        num_interrupted += sum(bool(seq.beams) for seq in outcome.preempted) if outcome is not None else 0
    assert len(expect_equal(family, loaded, runs)) >= 25
    assert all(len(loaded.emitted(seq)) == 6 for seq in greedy)
    assert num_interrupted > 0
    loaded.step()
    assert loaded.runner.num_sequences == 0
    expect_nothing_held(loaded)


@pytest.mark.full
@pytest.mark.parametrize("family", ["t5-gated", "mbart", "t5-small", "qwen3", "deepseek-v3"])
def test_other_families(family: str) -> None:
    loaded = engine(family)
    runs = [(text, add(loaded, text, WAYS[i % len(WAYS)])) for i, text in enumerate(wanted_texts(family, 12))]
    loaded.run()
    expect_equal(family, loaded, runs)
    expect_nothing_held(loaded)


def test_plans_ahead_cancels_and_preemption() -> None:
    """Others plan one step ahead of the device, searches wait for theirs; some end in the middle."""
    loaded = engine("llama", num_blocks=27)
    loaded.engine = OverlappedEngine(loaded.scheduler, loaded.runner)
    wanted = wanted_texts("llama", 12)
    runs = [(text, add(loaded, text, WAYS[i % len(WAYS)])) for i, text in enumerate(wanted)]
    cancelled = [add(loaded, text, WAYS[0]) for text in wanted[:4]]
    greedy = [add(loaded, text, SamplingParams(max_tokens=9, ignore_eos=True)) for text in wanted[:4]]
    num_copies = 0
    while loaded.engine.has_work:
        loaded.step()
        loaded.scheduler.check_integrity()
        num_copies += sum(bool(seq.beams) for seq in cancelled)
        for seq in cancelled:
            if seq.beams and seq.beams[0].num_emitted > 2:
                loaded.scheduler.abort(seq)
    assert num_copies and all(seq.is_finished and not seq.beams for seq in cancelled)
    expect_equal("llama", loaded, runs)
    assert sum(len(outcome.preempted) for outcome in loaded.outcomes) > 0
    assert all(len(loaded.emitted(seq)) == 9 for seq in greedy)
    expect_nothing_held(loaded)


def test_forced_tokens_cost_nothing() -> None:
    loaded = engine("bart")
    text = texts("bart", 8)[5]._replace(prompt=(2,))
    runs = [(text, add(loaded, text, searching(3, max_tokens=length), ForcedTokens(77, 99))) for length in (2, 6)]
    loaded.run()
    expect_equal("bart", loaded, runs)
    assert sum(outcome.num_searched_tokens for outcome in loaded.outcomes) == 3 * 2 + 3 * 6
    hypotheses = found(loaded, runs[-1][1])
    assert all((each.token_ids[0], each.token_ids[-1]) == (77, 99) for each in hypotheses) and len(hypotheses) == 3


def test_what_breaks_one_beam_ends_its_search_alone() -> None:
    """A step that fails ends all who are in it, each once; a beam without numbers ends its own search."""
    loaded = engine("llama")
    wanted = wanted_texts("llama", 4)
    first = add(loaded, wanted[0], searching(4, max_tokens=20))
    while not first.beams:
        loaded.step()
    plan = loaded.scheduler.schedule()
    result = loaded.runner.execute(plan)
    second = add(loaded, wanted[1], searching(2))
    outcome = loaded.scheduler.settle(plan, replace(result, failed={first.beams[1].id: "no numbers"}))
    assert outcome.failed == [first] and first.is_finished
    loaded.run()
    expect_equal("llama", loaded, [(wanted[1], second)])
    third = add(loaded, wanted[2], searching(3))
    while not third.beams:
        loaded.step()
    plan = loaded.scheduler.schedule()
    assert loaded.scheduler.abort_plan(plan) == [third]
    loaded.runner.execute(plan)
    loaded.scheduler.settle(plan, replace(result, candidates={}))
    loaded.step()
    assert loaded.runner.num_sequences == 0
    expect_nothing_held(loaded)


def test_searches_that_could_never_end_are_refused() -> None:
    loaded = engine("llama", num_blocks=16)

    def check(params: SamplingParams, *, num_tokens: int = 5, num_prompt: int | None = None) -> None:
        loaded.scheduler.check(loaded.sequence(list(range(1, 1 + num_tokens)), params, num_prompt=num_prompt))

    check(searching(4, max_tokens=8))
    with pytest.raises(InvalidRequest, match="num_beams=13 is over the max_sequences=12"):
        check(searching(13))
    with pytest.raises(RequestTooLong, match="24 tokens need 22 blocks of group self, over 16"):
        check(searching(4, max_tokens=20))
    check(searching(2, max_tokens=20))
    with pytest.raises(InvalidRequest, match="begins behind the prompt"):
        check(searching(4), num_prompt=4)
    for unfit in ({"temperature": 0.5}, {"num_logprobs": 0}, {"grammar": Grammar(GrammarKind.REGEX, "a")}):
        params = SamplingParams(max_tokens=4, beams=Beams(2), **unfit)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="num_beams: a search goes without"):
            check(params)

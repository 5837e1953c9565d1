"""Everything that SamplingParams asks for, through whole engines: chunks, preemption, neighbours, overlap, handoff."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.request import FinishReason, Pooling, SamplingParams
from tests.support import plain_sampler
from tests.support.counting_grammar import CountingCompiler, counting
from tests.support.engines import BLOCK_SIZE, TinyEngine, limits
from workers.engine.scheduler import SchedulerLimits
from workers.engine.sequence import Sequence, SequenceStatus
from workers.engine.step_plan import StepPlan

V = 97  # of the tiny model
PENALTIES = SamplingParams(
    ignore_eos=True, max_tokens=24, repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=0.6
)
WISHES = [
    PENALTIES,
    SamplingParams(ignore_eos=True, max_tokens=24, frequency_penalty=1.5, temperature=6.0, seed=7, min_p=0.1),
    SamplingParams(ignore_eos=True, max_tokens=24, logit_bias=((3, 15.0), (96, -100.0)), temperature=6.0, top_k=5),
    SamplingParams(ignore_eos=True, max_tokens=24, bad_words=tuple((a, b) for a in range(0, V, 2) for b in range(60))),
    SamplingParams(ignore_eos=True, max_tokens=24, grammar=counting(7), temperature=6.0, seed=1 << 63, sample=3),
    replace(PENALTIES, grammar=counting(2), bad_words=((1,), (2, 3)), temperature=6.0, top_p=0.7),
    SamplingParams(ignore_eos=True, max_tokens=24, min_tokens=9, stop_token_ids=tuple(range(0, V, 3)), temperature=6.0),
    SamplingParams(ignore_eos=True, max_tokens=24),
]
ROOMY = limits(max_batched_tokens=512, max_sequences=16, chunk_tokens=512)
TIGHT = limits(max_batched_tokens=24, max_sequences=6, chunk_tokens=7)


def engine(scheduler_limits: SchedulerLimits = ROOMY, *, num_blocks: int = 256) -> TinyEngine:
    return TinyEngine(num_blocks=num_blocks, scheduler_limits=scheduler_limits, constraints=CountingCompiler(V))


def prompt(seed: int, length: int = 20) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(V) for _ in range(length)]


def without_wishes(params: SamplingParams) -> SamplingParams:
    return SamplingParams(
        ignore_eos=True,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        seed=params.seed,
        sample=params.sample,
    )


def plainly(tiny: TinyEngine, tokens: list[int], params: SamplingParams) -> list[int]:
    """What it must emit, up to its end."""

    def allowed(emitted: object) -> list[int]:
        assert isinstance(emitted, list) and params.grammar is not None
        constraint = CountingCompiler(V).compile(params.grammar)
        constraint.advance(emitted)
        return constraint.allowed()

    emitted = plain_sampler.generate(
        tiny.model.next_token_logits,
        tokens,
        params,
        ending=params.stop_token_ids,
        allowed=allowed if params.grammar is not None else None,
    )
    stops = (i for i, token in enumerate(emitted) if token in params.stop_token_ids and i + 1 >= params.min_tokens)
    return emitted[: next(stops, len(emitted)) + 1]


@pytest.mark.parametrize("tight", [False, True])
def test_every_wish_is_what_the_plain_sampler_does_for_it_alone(tight: bool) -> None:
    tiny = engine(TIGHT, num_blocks=34) if tight else engine()
    prompts = [prompt(i, 9 + 2 * i) for i in range(len(WISHES))]
    sequences = [tiny.submit(tokens, params) for tokens, params in zip(prompts, WISHES, strict=True)]
    tiny.run()
    for tokens, params, seq in zip(prompts, WISHES, sequences, strict=True):
        assert tiny.emitted(seq) == plainly(tiny, tokens, params), params
    assert tight == (sum(seq.num_preemptions for seq in sequences) > 0)
    for tokens, params in zip(prompts, WISHES[:-1], strict=False):
        assert plainly(tiny, tokens, params) != plainly(tiny, tokens, without_wishes(params)), "it changed nothing"


@settings(max_examples=25)
@given(
    mates=st.lists(st.tuples(st.integers(0, len(WISHES) - 1), st.integers(1, 30)), max_size=6),
    chosen=st.integers(0, len(WISHES) - 1),
    chunk_tokens=st.integers(1, 30),
    seed=st.integers(0, 2**64 - 1),
    cut=st.integers(1, 6),
)
def test_batch_mates_chunks_and_replay_change_nothing(
    mates: list[tuple[int, int]], chosen: int, chunk_tokens: int, seed: int, cut: int
) -> None:
    params = replace(WISHES[chosen], seed=seed, max_tokens=8)
    tokens = prompt(chosen)
    lone = engine()
    alone = lone.submit(tokens, params)
    lone.run()
    busy = engine(limits(max_batched_tokens=40, max_sequences=8, chunk_tokens=chunk_tokens), num_blocks=40)
    for i, (which, length) in enumerate(mates):
        busy.submit(prompt(100 + i, length), WISHES[which])
    crowded = busy.submit(tokens, params)
    busy.run()
    emitted = lone.emitted(alone)
    assert busy.emitted(crowded) == emitted
    if len(emitted) > cut:
        replayed = busy.submit([*tokens, *emitted[:cut]], params, num_prompt=len(tokens))
        busy.run()
        assert busy.emitted(replayed) == emitted[cut:]


def test_with_a_step_of_overlap_a_token_is_known_before_the_next_is_drawn() -> None:
    tiny = engine()
    prompts = [prompt(i) for i in range(len(WISHES))]
    sequences = [tiny.submit(tokens, params) for tokens, params in zip(prompts, WISHES, strict=True)]
    in_flight: list[StepPlan] = []
    results = []
    while tiny.scheduler.has_work or in_flight:
        if tiny.scheduler.has_work:
            in_flight.append(tiny.scheduler.schedule())
            results.append(tiny.runner.launch(in_flight[-1]))
        if len(in_flight) == 2 or not tiny.scheduler.has_work:
            tiny.outcomes.append(tiny.scheduler.settle(in_flight.pop(0), results.pop(0).collect()))
    for tokens, params, seq in zip(prompts, WISHES, sequences, strict=True):
        assert tiny.emitted(seq) == plainly(tiny, tokens, params), params


def test_tokens_that_came_from_elsewhere_after_a_preemption_count() -> None:
    """Preempted here, pulled instead; meanwhile its source hands over tokens. The ranks knew it before."""
    tiny = engine(replace(limits(max_sequences=4), prefill_reserve=0.0), num_blocks=18)
    params = replace(WISHES[5], max_tokens=30)
    first = tiny.submit(prompt(1, 24), replace(PENALTIES, max_tokens=30))
    second = tiny.submit(prompt(2, 24), params)
    expected = plainly(tiny, prompt(2, 24), params)
    while second.num_preemptions == 0 or second.is_unreported:
        tiny.step()
    assert 0 < second.num_emitted < 20
    tiny.scheduler.park(second)
    while not first.is_finished:
        tiny.step()
    tiny.blocks.clear_cache()
    reservation = tiny.scheduler.reserve_for_pull(second)
    assert reservation is not None and reservation.first_block == 0
    known = second.num_emitted
    for token in expected[known : known + 3]:
        tiny.scheduler.append_token(second, token)
    for position, token in enumerate(second.tokens[: 24 + known]):  # the bytes arrive
        block = reservation.destination[0][position // BLOCK_SIZE]
        tiny.model.rows[block, position % BLOCK_SIZE] = tiny.model.embedding[token]
    tiny.scheduler.pull_done(second, 24 + known)
    assert second.num_computed == 24 + known
    assert second.status is SequenceStatus.RUNNING
    tiny.run()
    assert second.tokens[24:] == expected
    assert tiny.emitted(second) == expected[:known] + expected[known + 3 :]


# ---------------------------------------------------------------- what is read, not drawn


def expect_logprobs(tiny: TinyEngine, seq: Sequence, num_prompt: int, *, from_prompt: bool) -> None:
    """All that it said, against forward passes without any cache."""
    said = tiny.prompt_logprobs(seq) if from_prompt else {}
    assert sorted(said) == (list(range(1, num_prompt)) if from_prompt else [])
    entries = {**said, **dict(enumerate(tiny.logprobs(seq), num_prompt))}
    for index, entry in entries.items():
        assert entry is not None
        raw = tiny.model.next_token_logits(seq.tokens[:index])[0].log_softmax(-1)
        assert abs(entry.logprob - float(raw[seq.tokens[index]])) < 1e-4
        count = seq.params.num_prompt_logprobs if index < num_prompt else seq.params.num_logprobs
        best = raw.topk(count or 0)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert all(abs(value - float(v)) < 1e-4 for (_, value), v in zip(entry.top, best.values, strict=True))


@pytest.mark.parametrize("tight", [False, True])
def test_logprobs_of_tokens_and_prompts_are_those_of_a_full_forward(tight: bool) -> None:
    tiny = engine(TIGHT, num_blocks=34) if tight else engine()
    shared = prompt(0, 16)
    tiny.submit(shared, SamplingParams(max_tokens=1))
    tiny.run()
    wants = [
        replace(PENALTIES, num_logprobs=3, num_prompt_logprobs=2),
        replace(WISHES[1], num_logprobs=0, num_prompt_logprobs=0),
        replace(WISHES[5], num_logprobs=5),
        replace(WISHES[7], num_prompt_logprobs=1),
        replace(WISHES[7], num_logprobs=1),
    ]
    prompts = [[*shared, *prompt(i, 3 + i)] for i in range(len(wants))]
    sequences = [tiny.submit(tokens, params) for tokens, params in zip(prompts, wants, strict=True)]
    tiny.run()
    for tokens, params, seq in zip(prompts, wants, sequences, strict=True):
        if params.num_logprobs is None:
            assert set(tiny.logprobs(seq)) == {None}
            seq.params = replace(params, num_logprobs=0)
            assert sorted(tiny.prompt_logprobs(seq)) == list(range(1, len(tokens)))
        else:
            expect_logprobs(tiny, seq, len(tokens), from_prompt=params.num_prompt_logprobs is not None)
        if not tight:
            assert seq.prefix_hit_tokens == (0 if params.needs_whole_prompt else 16)
        assert tiny.emitted(seq) == plainly(tiny, tokens, params)
    assert tight == (sum(seq.num_preemptions for seq in sequences) > 0)


def test_a_prompt_that_was_looked_at_whole_may_be_hit_by_others() -> None:
    tiny = engine()
    whole = tiny.submit(prompt(0), replace(WISHES[7], num_prompt_logprobs=0))
    tiny.run()
    hits = tiny.submit(prompt(0), WISHES[7])
    again = tiny.submit(prompt(0), replace(WISHES[7], num_prompt_logprobs=0))
    tiny.run()
    assert (whole.prefix_hit_tokens, hits.prefix_hit_tokens, again.prefix_hit_tokens) == (0, 16, 0)
    assert tiny.emitted(whole) == tiny.emitted(hits) == tiny.emitted(again)


@pytest.mark.parametrize("source", [False, True])
def test_a_pooled_prompt_ends_with_its_vector(source: bool) -> None:
    tiny = engine(limits(max_batched_tokens=16, max_sequences=4, chunk_tokens=6))
    tiny.submit(prompt(0, 30), SamplingParams(max_tokens=1))
    tiny.run()
    given_ = [(0, 30, Pooling.LAST), (0, 30, Pooling.MEAN), (5, 1, Pooling.MEAN), (6, 1, Pooling.LAST)]
    sequences = [
        tiny.submit(prompt(seed, length), SamplingParams(pooling=pooling), stop_after_first=source)
        for seed, length, pooling in given_
    ]
    beside = tiny.submit(prompt(9, 10), SamplingParams(max_tokens=12, ignore_eos=True))
    ends = 0
    while not all(seq.is_finished for seq in sequences):
        outcome = tiny.step()
        assert outcome is not None
        ended = [seq for seq in outcome.finished if seq.params.pooling is not None]
        assert [each.seq for each in outcome.vectors] == ended
        for seq in ended:
            ends += 1
            assert seq.finish is FinishReason.STOP
            assert bool(seq.block_tables) == source, "a source's blocks linger until the next step, nobody else's"
    tiny.run()
    assert ends == len(given_)
    for (seed, length, pooling), seq in zip(given_, sequences, strict=True):
        hidden = torch.stack([tiny.model.final_hidden(prompt(seed, length)[: n + 1]) for n in range(length)])
        expected = hidden[-1] if pooling is Pooling.LAST else hidden.mean(0)
        np.testing.assert_allclose(tiny.vector(seq), expected.numpy(), rtol=1e-5, atol=1e-5)
        assert tiny.emitted(seq) == []
        assert seq.prefix_hit_tokens == (28 if length == 30 and pooling is Pooling.LAST else 0)
    assert tiny.emitted(beside) == tiny.model.greedy(prompt(9, 10), 12)
    tiny.scheduler.check_integrity()


def test_a_pooled_prompt_may_fill_the_model_and_begins_again_after_a_preemption() -> None:
    tiny = engine(limits(max_model_len=40, max_sequences=4, max_batched_tokens=16, chunk_tokens=4), num_blocks=14)
    first = tiny.submit(prompt(1, 12), SamplingParams(max_tokens=28, ignore_eos=True))
    second = tiny.submit(prompt(2, 40), SamplingParams(pooling=Pooling.MEAN))
    tiny.run()
    assert second.num_preemptions > 0
    hidden = torch.stack([tiny.model.final_hidden(prompt(2, 40)[: n + 1]) for n in range(40)])
    np.testing.assert_allclose(tiny.vector(second), hidden.mean(0).numpy(), rtol=1e-5, atol=1e-5)
    assert tiny.emitted(first) == tiny.model.greedy(prompt(1, 12), 28)


# ---------------------------------------------------------------- rows that cannot be drawn


def test_logits_that_are_not_numbers_fail_their_sequence_alone() -> None:
    tiny = engine()
    tiny.model.embedding[90:94] = torch.tensor([torch.nan, torch.inf, torch.nan, torch.nan])[:, None]
    good = [i % 90 for i in prompt(1)]
    bad = [
        tiny.submit([*good, 90], WISHES[7]),
        tiny.submit([*good, 91], replace(WISHES[1], num_logprobs=2)),
        tiny.submit([92, *good], replace(WISHES[7], num_prompt_logprobs=0)),
        tiny.submit([*good, 93], SamplingParams(pooling=Pooling.MEAN)),
    ]
    fine = tiny.submit(good, WISHES[7])
    outcome = tiny.step()
    assert outcome is not None
    assert outcome.failed == bad
    assert outcome.error is not None and "not finite numbers" in str(outcome.error)
    assert [token.seq for token in outcome.tokens] == [fine]
    assert tiny.engine.num_failed_steps == 0
    tiny.run()
    assert tiny.emitted(fine) == tiny.model.greedy(good, 24)
    tiny.model.embedding[92] = 0.0
    after = tiny.submit([92, *good], WISHES[7])
    tiny.run()
    assert after.prefix_hit_tokens == 0, "what a failed row wrote was hit"
    assert tiny.emitted(after) == tiny.model.greedy([92, *good], 24)
    tiny.scheduler.check_integrity()


def test_a_grammar_that_breaks_mid_way_fails_its_sequence_alone() -> None:
    tiny = engine()
    broken = tiny.submit(prompt(1), replace(WISHES[7], grammar=counting(2, breaks_at=5)))
    fine = tiny.submit(prompt(1), replace(WISHES[7], grammar=counting(2)))
    tiny.run()
    assert tiny.emitted(broken) == plainly(tiny, prompt(1), fine.params)[:5]
    errors = [(outcome.failed, str(outcome.error)) for outcome in tiny.outcomes if outcome.error is not None]
    assert [failed for failed, _ in errors] == [[broken]]
    assert "the grammar broke at 5" in errors[0][1]
    assert tiny.emitted(fine) == plainly(tiny, prompt(1), fine.params)
    assert tiny.runner.num_sequences <= 1


def test_a_complete_text_ends_the_sequence_whatever_min_tokens_says() -> None:
    tiny = TinyEngine(eos_token_ids=frozenset({0}), constraints=CountingCompiler(V))
    seq = tiny.submit(prompt(1), SamplingParams(max_tokens=20, min_tokens=10, grammar=counting(3, length=4)))
    tiny.run()
    assert len(tiny.emitted(seq)) == 5 and tiny.emitted(seq)[-1] == 0
    assert tiny.finish(seq) is FinishReason.STOP

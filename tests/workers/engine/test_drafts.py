"""Guesses beside the last known token: the same tokens in fewer steps, whoever guesses, and whatever is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.request import Beams, FinishReason, Grammar, GrammarKind, Pooling, SamplingParams
from tests.support.checkpoints import DecidedRun, checkpoint, decided, ragged_prompts
from tests.support.engine_builders import EngineDouble, Foresight, expected_tokens
from tests.support.engines import LoadedEngine, TinyEngine, limits
from workers.engine.overlap import OverlappedEngine
from workers.engine.step_plan import Literal, StepOutcome, StepPlan, StepResult
from workers.models.loader import load
from workers.speculative.ngram import NgramProposer

NUM_TOKENS = 48


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def drafts(plan: StepPlan) -> list[int]:
    return [row.num_drafts for row in plan.sequences]


def counts(outcomes: Sequence[StepOutcome]) -> tuple[int, int, int]:
    return (
        sum(outcome.num_drafted_rows for outcome in outcomes),
        sum(outcome.num_drafts for outcome in outcomes),
        sum(outcome.num_accepted_drafts for outcome in outcomes),
    )


# ---------------------------------------------------------------- plans and what becomes of them


def test_right_guesses_are_tokens_of_one_step() -> None:
    foresight = Foresight(wrong_every=100)
    engine = EngineDouble(block_size=8, proposer=foresight)
    seq = engine.sequence([1, 2, 3], params=greedy(10))
    engine.scheduler.add(seq)
    steps = [engine.step() for _ in range(3)]
    expected = expected_tokens([1, 2, 3], seq.params, 64)
    plans = [plan for plan, _ in steps]
    assert [drafts(plan) for plan in plans] == [[0], [4], [3]], "a block has 8 places, and the text 13"
    assert plans[1].sequences[0].inputs == Literal(tuple(expected[:5])) and plans[1].num_drafts == 4
    assert [[token for _, token, *_ in outcome.tokens] for _, outcome in steps] == [
        expected[:1],
        expected[1:6],
        expected[6:],
    ]
    assert counts([outcome for _, outcome in steps]) == (2, 7, 7)
    assert seq.finish is FinishReason.LENGTH and not foresight.known, "it is forgotten with its end"
    engine.check_empty()


def test_a_wrong_guess_costs_what_stands_behind_it_and_nothing_else() -> None:
    engine = EngineDouble(block_size=16, proposer=Foresight(wrong_every=3))
    seq = engine.sequence([1, 2], params=greedy(12))
    engine.scheduler.add(seq)
    outcomes = engine.run()
    assert engine.emitted[seq.id] == expected_tokens([1, 2], seq.params, 64)
    _, num_drafts, num_accepted = counts(outcomes)
    assert 0 < num_accepted < num_drafts
    assert len(outcomes) < 9
    engine.check_empty()


def test_guesses_get_what_the_budget_leaves() -> None:
    """Behind prompts; a batch that is full of them carries none."""
    engine = EngineDouble(block_size=16, max_batched_tokens=8, chunk_tokens=8, proposer=Foresight(wrong_every=100))
    first = engine.sequence([1, 2], params=greedy(30))
    engine.scheduler.add(first)
    engine.step()
    engine.scheduler.add(engine.sequence(list(range(12)), params=greedy(2)))
    plans = [engine.step()[0] for _ in range(2)]
    assert [(drafts(plan), plan.num_tokens) for plan in plans] == [([0, 0], 8), ([2, 0], 8)]


def test_no_token_is_guessed_behind_the_last_one() -> None:
    engine = EngineDouble(block_size=16, proposer=Foresight(wrong_every=100))
    one, two, source = (
        engine.sequence([1, 2], params=greedy(1)),
        engine.sequence([1, 3], params=greedy(2)),
        engine.sequence([1, 4], stop_after_first=True),
    )
    for seq in (one, two, source):
        engine.scheduler.add(seq)
    plans = [engine.step()[0] for _ in range(2)]
    assert [drafts(plan) for plan in plans] == [[0, 0, 0], [0]]


@pytest.mark.parametrize("where", range(4))
def test_nothing_follows_a_token_that_ends_the_text(where: int) -> None:
    """Though it was guessed rightly, with others behind it."""
    engine = EngineDouble(block_size=16, proposer=Foresight(wrong_every=100))
    text = expected_tokens([1, 2, 3], greedy(12), 64)
    stop = text[2 + where]
    assert stop not in text[: 2 + where]
    seq = engine.sequence([1, 2, 3], params=SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=(stop,)))
    engine.scheduler.add(seq)
    engine.run()
    assert engine.emitted[seq.id] == text[: 3 + where] and seq.finish is FinishReason.STOP
    engine.check_empty()


def test_a_handed_over_token_is_followed_by_guesses_at_once() -> None:
    engine = EngineDouble(block_size=16, proposer=Foresight(wrong_every=100))
    prompt = [1, 2, 3]
    seq = engine.sequence(prompt, params=greedy(6))
    reservation = engine.scheduler.reserve_for_pull(seq)
    assert reservation is not None
    engine.rank.receive(reservation.destination[0], 0, prompt)
    expected = expected_tokens(prompt, seq.params, 64)
    engine.scheduler.append_token(seq, expected[0])
    engine.scheduler.pull_done(seq, 3)
    plan, outcome = engine.step()
    assert drafts(plan) == [4] and [token for _, token, *_ in outcome.tokens] == expected[1:]
    assert not outcome.chunks, "nothing of what was known had to be computed"


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=9, repetition_penalty=1.1),
        SamplingParams(max_tokens=9, bad_words=((5,),)),
        SamplingParams(max_tokens=9, no_repeat_ngram_size=2),
        SamplingParams(max_tokens=9, grammar=Grammar(GrammarKind.REGEX, "a")),
        SamplingParams(max_tokens=9, num_logprobs=0),
        SamplingParams(max_tokens=9, num_prompt_logprobs=0),
        SamplingParams(max_tokens=9, pooling=Pooling.LAST),
        SamplingParams(max_tokens=9, beams=Beams(2)),
    ],
)
def test_what_needs_the_token_before_takes_no_guesses(params: SamplingParams) -> None:
    assert not params.takes_drafts


def test_ended_while_its_guesses_are_in_flight() -> None:
    """With the next plan made meanwhile, which has nothing for those whose guesses are not judged."""
    engine = EngineDouble(block_size=16, late=True, proposer=Foresight(wrong_every=100))
    seqs = [engine.sequence([number, number], params=greedy(12)) for number in range(1, 4)]
    for seq in seqs:
        engine.scheduler.add(seq)
    engine.step()
    plan = engine.scheduler.schedule()
    assert drafts(plan) == [5, 5, 3], "16 tokens a step"
    following = engine.scheduler.schedule()
    assert not following.sequences
    engine.scheduler.abort(seqs[0])
    engine.settle(plan)
    engine.settle(following)
    engine.run()
    expected = [expected_tokens([number, number], seqs[0].params, 64) for number in range(1, 4)]
    assert engine.emitted[1] == expected[0][:1], "what it had when it ended"
    assert [engine.emitted[2], engine.emitted[3]] == expected[1:]
    engine.check_empty()


def test_a_step_that_fails_ends_what_it_guessed_for() -> None:
    engine = EngineDouble(block_size=16, proposer=Foresight(wrong_every=100))
    failed = engine.sequence([1, 2], params=greedy(12))
    engine.scheduler.add(failed)
    engine.step()
    plan = engine.scheduler.schedule()
    assert plan.num_drafts == 5
    engine.rank.run(plan)
    assert engine.scheduler.abort_plan(plan) == [failed]
    outcome = engine.scheduler.settle(plan, StepResult())
    assert not outcome.tokens and outcome.num_drafts == 0
    engine.check_empty()


# ---------------------------------------------------------------- whole engines


@settings(max_examples=25)
@given(data=st.data())
def test_the_same_tokens_drawn_or_not(data: st.DataObject) -> None:
    """Texts that repeat themselves, all sampling parameters, few blocks, overlapped or not."""
    pieces = data.draw(st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=4), min_size=1, max_size=3))
    params = data.draw(
        st.lists(
            st.builds(
                SamplingParams,
                max_tokens=st.integers(1, 30),
                min_tokens=st.integers(0, 6),
                temperature=st.sampled_from([0.0, 0.2, 0.9]),
                top_k=st.sampled_from([0, 3]),
                top_p=st.sampled_from([1.0, 0.5]),
                seed=st.integers(0, 99),
                stop_token_ids=st.sampled_from([(), tuple(range(0, 97, 7))]),
                repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
                logit_bias=st.sampled_from([(), ((3, 40.0), (4, 39.5))]),
                num_logprobs=st.sampled_from([None, None, 1]),
                ignore_eos=st.just(True),
            ),
            min_size=1,
            max_size=5,
        )
    )
    texts: list[list[list[int]]] = []
    for proposer in (None, NgramProposer(4, 2)):
        tiny = TinyEngine(
            num_blocks=26,
            scheduler_limits=limits(max_batched_tokens=40, max_sequences=4, chunk_tokens=16),
            proposer=proposer,
        )
        if proposer is not None and data.draw(st.booleans()):
            tiny.engine = OverlappedEngine(tiny.scheduler, tiny.runner)
        seqs = [tiny.submit(pieces[i % len(pieces)] * 4, each) for i, each in enumerate(params)]
        tiny.run()
        tiny.scheduler.check_integrity()
        assert all(tiny.blocks.counts(0).filling == 0 for _ in seqs)
        texts.append([tiny.emitted(seq) for seq in seqs])
    assert texts[0] == texts[1]


def test_a_text_that_repeats_itself_takes_fewer_steps() -> None:
    """A strong bias has the model say the same two tokens in turn."""
    num_steps: list[int] = []
    for proposer in (None, NgramProposer(4, 2)):
        tiny = TinyEngine(proposer=proposer)
        seq = tiny.submit([3, 4] * 3, SamplingParams(max_tokens=40, ignore_eos=True, logit_bias=((3, 1e4),)))
        tiny.run()
        assert tiny.emitted(seq) == [3] * 40
        num_steps.append(tiny.engine.num_steps)
    rows, num_drafts, num_accepted = counts(tiny.outcomes)
    assert num_steps[0] >= 40 and num_steps[1] <= 16
    assert num_accepted / rows > 2 and num_drafts >= num_accepted


class Recital:
    """Guesses from the texts that transformers wrote, with every fifth token wrong."""

    def __init__(self, runs: Sequence[DecidedRun]) -> None:
        self.texts = {tuple(run.prompt): [*run.prompt, *run.tokens] for run in runs}
        self.num_right = self.num_wrong = 0

    def propose(self, id_: int, tokens: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        text = next(text for prompt, text in self.texts.items() if tuple(tokens[: len(prompt)]) == prompt)
        known = len(tokens)
        guesses = text[known : known + min(max_tokens, 4)]
        return tuple(token if place % 5 else token ^ 1 for place, token in enumerate(guesses, known))

    def judged(self, id_: int, num_drafts: int, num_accepted: int, num_tokens: int) -> None:
        self.num_right += num_accepted
        self.num_wrong += num_drafts - num_accepted

    def forget(self, id_: int) -> None: ...


@pytest.mark.parametrize("family", ["llama", "deepseek-v32", "qwen3-moe"])
def test_equals_transformers(family: str) -> None:
    """Guesses of all lengths beside prompts in chunks, in a pool too small for all: what they leave behind in the cache
    is not read, and they are attended to as they should while they are judged."""
    candidates = (prompt for seed in range(4) for prompt in ragged_prompts(6, longest=70, seed=seed))
    runs = decided(family, tuple(map(tuple, candidates)), 6, NUM_TOKENS)
    recital = Recital(runs)
    loaded = LoadedEngine(
        load(checkpoint(family)),
        num_blocks=22,
        scheduler_limits=limits(max_batched_tokens=40, chunk_tokens=16),
        proposer=recital,
    )
    sequences = [loaded.add(run.prompt, max_tokens=NUM_TOKENS) for run in runs]
    loaded.run()
    for run, seq in zip(runs, sequences, strict=True):
        assert loaded.emitted(seq) == run.tokens
    assert recital.num_right > 60 and recital.num_wrong > 30
    assert sum(len(outcome.preempted) for outcome in loaded.outcomes) > 0
    loaded.scheduler.check_integrity()

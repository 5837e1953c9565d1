from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.request import SamplingParams
from tests.support import plain_sampler
from tests.support.counting_grammar import CountingCompiler, counting
from workers.engine.adjustments import Adjustments, adjustments
from workers.engine.sequence_mirror import SequenceMirror
from workers.engine.step_plan import NewSequence, StepPlan

V = 40
EOS = (3, 38)


class Rows:
    """Adjustments of sequences that all draw their next token."""

    def __init__(self, sequences: Sequence[tuple[SamplingParams, int, Sequence[int]]]) -> None:
        """sequences: parameters, length of the prompt, tokens."""
        self.mirror = SequenceMirror([4], frozenset(EOS), CountingCompiler(V))
        new = [
            NewSequence(i, num_prompt, params, (), ((),), tuple(tokens) if params.needs_history else ())
            for i, (params, num_prompt, tokens) in enumerate(sequences)
        ]
        self.mirror.apply(StepPlan(1, (), new=tuple(new)))
        self.lengths = torch.tensor([len(tokens) for *_, tokens in sequences]).numpy()

    def adjustments(self) -> tuple[Adjustments | None, dict[int, str]]:
        return adjustments(self.mirror, self.mirror.slots(range(len(self.lengths))), self.lengths, V)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        adjusted, failures = self.adjustments()
        assert not failures
        return logits if adjusted is None else adjusted.apply(logits.clone())


def alone(
    params: SamplingParams, logits: torch.Tensor, *, num_prompt: int = 1, tokens: Sequence[int] = (5,)
) -> set[int]:
    """The tokens that one sequence may draw next."""
    return set((Rows([(params, num_prompt, tokens)]).apply(logits[None])[0] != -torch.inf).nonzero()[:, 0].tolist())


tokens = st.integers(0, V - 1)
penalty = st.sampled_from([0.0, -1.5, 0.25, 2.0])
all_params = st.builds(
    SamplingParams,
    min_tokens=st.sampled_from([0, 3]),
    stop_token_ids=st.sampled_from([(), (7,)]),
    ignore_eos=st.booleans(),
    presence_penalty=penalty,
    frequency_penalty=penalty,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
    logit_bias=st.lists(st.tuples(tokens, st.sampled_from([-100.0, -1.0, 3.0])), max_size=3).map(tuple),
    bad_words=st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=6).map(tuple),
    grammar=st.none() | st.just(counting(3)),
)


@given(many=st.lists(st.tuples(all_params, st.integers(0, 1000), st.integers(1, 25)), min_size=1, max_size=6))
def test_rows_are_what_transformers_processors_make_of_each_alone(many: list[tuple[SamplingParams, int, int]]) -> None:
    sequences: list[tuple[SamplingParams, int, list[int]]] = []
    for params, seed, num_prompt in many:
        draw = random.Random(seed)
        # Few different tokens, and the beginnings of bad words, so that everything has something to do.
        tail = [token for word in params.bad_words[:1] for token in word[:-1]]
        emitted = [draw.randrange(8) for _ in range(draw.randrange(6))] + tail
        sequences.append((params, num_prompt, [draw.randrange(V) for _ in range(num_prompt)] + emitted))
    logits = torch.randn(len(many), V, generator=torch.Generator().manual_seed(many[0][1])) * 3
    rows = Rows(sequences).apply(logits)
    for row, raw, (params, num_prompt, known) in zip(rows, logits, sequences, strict=True):
        emitted = known[num_prompt:]
        allowed = [t for t in range(1, V) if t % 3 == len(emitted) % 3] if params.grammar else None
        ending = (*params.stop_token_ids, *(() if params.ignore_eos else EOS))
        expected = plain_sampler.adjusted(raw, known[:num_prompt], emitted, params, ending=ending, allowed=allowed)
        if not (expected == -torch.inf).all():  # else something is lifted, which transformers does not do
            torch.testing.assert_close(row, expected)


def test_a_row_without_wishes_keeps_its_logits_bit_for_bit() -> None:
    plain = SamplingParams()
    wild = SamplingParams(
        repetition_penalty=2.0, frequency_penalty=1.0, logit_bias=((1, 5.0),), bad_words=((2,),), grammar=counting(5)
    )
    logits = torch.randn(3, V)
    assert torch.equal(Rows([(plain, 2, [1, 2])] * 3).apply(logits), logits)
    assert Rows([(plain, 2, [1, 2])]).adjustments() == (None, {})
    mixed = Rows([(plain, 2, [1, 2, 3]), (wild, 2, [1, 2, 3]), (plain, 1, [4])]).apply(logits)
    assert torch.equal(mixed[[0, 2]], logits[[0, 2]])
    assert not torch.equal(mixed[1], logits[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_narrow_logits_are_adjusted_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(1, V).to(dtype)
    params = SamplingParams(repetition_penalty=1.37, frequency_penalty=0.123)
    row = Rows([(params, 1, [1, 2, 2])]).apply(logits)[0]
    torch.testing.assert_close(row.float(), plain_sampler.adjusted(logits[0], [1], [2, 2], params))


def test_the_same_token_may_be_biased_and_forbidden_twice() -> None:
    params = SamplingParams(logit_bias=((4, 1.0), (4, 2.0)), bad_words=((6,), (6,), (5, 6)))
    row = Rows([(params, 1, [5])]).apply(torch.zeros(1, V))[0]
    assert row[4] == 3.0
    assert row[6] == -torch.inf
    assert (row == -torch.inf).sum() == 1


def test_a_bad_word_may_begin_in_the_prompt_and_single_tokens_are_always_bad() -> None:
    params = SamplingParams(bad_words=((9,), (1, 2, 8), (2, 7), (1, 3, 6)))
    assert alone(params, torch.zeros(V), num_prompt=2, tokens=[1, 2]) == set(range(V)) - {9, 8, 7}
    assert alone(params, torch.zeros(V), num_prompt=1, tokens=[1, 3]) == set(range(V)) - {9, 6}
    assert alone(params, torch.zeros(V), num_prompt=1, tokens=[2]) == set(range(V)) - {9, 7}


def test_a_grammar_wins_over_bad_words_and_early_ends_and_those_over_bad_words() -> None:
    zeros = torch.zeros(V)
    only_eos = counting(3, length=0)  # EOS is 0 there
    assert alone(SamplingParams(grammar=only_eos, bad_words=((0,),)), zeros) == {0}
    assert alone(SamplingParams(grammar=only_eos, min_tokens=4, stop_token_ids=(0,)), zeros) == {0}
    # The grammar allows 1, 21, ...: of those, all but the bad ones.
    twenty = counting(20)
    after_one = {"num_prompt": 1, "tokens": [5, 20]}
    assert alone(SamplingParams(grammar=twenty, bad_words=((1,),)), zeros, **after_one) == {21}
    assert alone(SamplingParams(grammar=twenty, bad_words=((1,), (21,))), zeros, **after_one) == {1, 21}
    # Everything but the ends is a bad word: the ends stay forbidden.
    every = tuple((token,) for token in range(V) if token not in EOS)
    assert alone(SamplingParams(min_tokens=1, bad_words=every), zeros) == set(range(V)) - set(EOS)
    assert alone(SamplingParams(bad_words=tuple((token,) for token in range(V))), zeros) == set(range(V))
    assert alone(SamplingParams(min_tokens=1, stop_token_ids=tuple(range(V))), zeros) == set(range(V))


def test_a_grammar_that_raises_fails_its_row_alone() -> None:
    broken = SamplingParams(grammar=counting(2, breaks_at=1))
    fine = SamplingParams(grammar=counting(2))
    logits = torch.randn(3, V)
    rows = Rows([(fine, 1, [5]), (broken, 1, [5, 6]), (fine, 1, [5, 6])])
    adjusted, failures = rows.adjustments()
    assert failures == {1: "grammar: RuntimeError: the grammar broke at 1"}
    assert adjusted is not None
    together = adjusted.apply(logits.clone())
    for row, known in [(0, [5]), (2, [5, 6])]:
        assert torch.equal(together[row], Rows([(fine, 1, known)]).apply(logits[row : row + 1])[0])

"""The rules of a search against a plain one, which keeps whole texts and looks at every token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import starmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.request import Beams, EarlyStopping, FinishReason, Hypothesis
from workers.engine.beam_search import BeamSearch, Candidate, num_candidates

Text = tuple[int, ...]
Model = Callable[[Text], Sequence[float]]


def plain(model: Model, beams: Beams, ends: frozenset[int], max_new_tokens: int) -> list[tuple[Text, float]]:
    """Texts and scores, best first."""
    width, penalty = beams.num_beams, beams.length_penalty
    live: list[tuple[Text, float]] = [((), 0.0)]
    found: list[tuple[Text, float]] = []
    for length in range(1, max_new_tokens + 1):
        longer = [
            ((*text, token), score + logprob)
            for text, score in live
            for token, logprob in enumerate(model(text))
            if logprob > -math.inf
        ]
        longer.sort(key=lambda each: -each[1])
        ended = [each for each in longer[:width] if each[0][-1] in ends or length == max_new_tokens]
        found = sorted([*found, *((text, score / length**penalty) for text, score in ended)], key=lambda each: -each[1])
        found = found[:width]
        live = [each for each in longer if each[0][-1] not in ends][:width]
        if not live:
            break
        if len(found) == width:
            hope = length if beams.early_stopping is EarlyStopping.UNLIKELY or penalty <= 0 else max_new_tokens
            if beams.early_stopping is EarlyStopping.AT_ONCE or live[0][1] / hope**penalty <= found[-1][1]:
                break
    return found[: beams.num_returned]


def searched(model: Model, beams: Beams, ends: frozenset[int], max_new_tokens: int) -> list[Hypothesis]:
    search = BeamSearch(beams, ends, max_new_tokens)
    count = num_candidates(beams.num_beams, len(ends))
    texts: list[Text] = [()]
    while True:
        offered = [sorted(starmap(Candidate, enumerate(model(text))), key=lambda each: -each.logprob) for text in texts]
        branches = search.advance(texts, [each[:count] for each in offered])
        if not branches:
            return search.hypotheses
        texts = [(*texts[branch.parent], branch.token) for branch in branches]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_beams=st.integers(2, 5),
    vocab_size=st.integers(2, 12),
    ends=st.frozensets(st.integers(0, 11), max_size=3),
    max_new_tokens=st.integers(1, 7),
    penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0]),
    early=st.sampled_from(list(EarlyStopping)),
    forbidden=st.sampled_from([0.0, 0.3]),
    data=st.data(),
)
def test_it_finds_what_a_plain_search_finds(
    seed: int,
    num_beams: int,
    vocab_size: int,
    ends: frozenset[int],
    max_new_tokens: int,
    penalty: float,
    early: EarlyStopping,
    forbidden: float,
    data: st.DataObject,
) -> None:
    def model(text: Text) -> Sequence[float]:
        draws = [(hash((seed, text, token)) % 1_000_003 + 1) / 1_000_004 for token in range(vocab_size)]
        allowed = [draw if draw >= forbidden else 0.0 for draw in draws]
        if not any(allowed):
            allowed[0] = 1.0
        return [math.log(each / sum(allowed)) if each else -math.inf for each in allowed]

    beams = Beams(num_beams, data.draw(st.integers(1, num_beams)), penalty, early)
    found = searched(model, beams, ends, max_new_tokens)
    wanted = plain(model, beams, ends, max_new_tokens)
    assert [each.token_ids for each in found] == [text for text, _ in wanted]
    assert [each.score for each in found] == pytest.approx([score for _, score in wanted])
    for each in found:
        ended = each.token_ids[-1] in ends
        assert each.finish is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert ended or len(each.token_ids) == max_new_tokens

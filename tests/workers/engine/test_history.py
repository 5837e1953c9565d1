from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequest
from cluster.request import SamplingParams
from tests.support.counting_grammar import CountingCompiler, counting
from workers.engine.history import History

PARAMS = SamplingParams(
    repetition_penalty=1.5,
    frequency_penalty=1.0,
    bad_words=((1,), (2, 3), (4, 2, 5)),
    grammar=counting(4),
    no_repeat_ngram_size=3,
)


def state(history: History) -> tuple[list[int], dict[int, float], list[int], list[int]]:
    mask = np.zeros(4, np.uint32)
    history.fill(mask)
    assert history.counts is not None
    counts = dict(zip(history.counts.ids.tolist(), history.counts.counts.tolist(), strict=True))
    return history.tokens, counts, history.forbidden(), mask.tolist()


@given(
    tokens=st.lists(st.integers(0, 6), min_size=1, max_size=200),
    num_prompt=st.integers(1, 200),
    data=st.data(),
)
def test_the_state_depends_on_the_tokens_only_not_on_how_they_came(
    tokens: list[int], num_prompt: int, data: st.DataObject
) -> None:
    num_prompt = min(num_prompt, len(tokens))
    whole = History(PARAMS, num_prompt, CountingCompiler(100))
    whole.extend(0, tokens)
    pieces = History(PARAMS, num_prompt, CountingCompiler(100))
    while len(pieces.tokens) < len(tokens):
        known = len(pieces.tokens)
        start = data.draw(st.integers(0, known))  # a recompute says tokens again
        pieces.extend(start, tokens[start : known + data.draw(st.integers(1, 50))])
        if known >= num_prompt and data.draw(st.booleans()):
            pieces.fill(np.zeros(4, np.uint32))  # the grammar is fed in other pieces
    assert state(pieces) == state(whole)
    emitted = Counter(tokens[num_prompt:])
    assert state(whole)[1] == {token: emitted[token] for token in tokens}


def test_a_prompt_is_no_penalty_where_only_emitted_tokens_count() -> None:
    history = History(SamplingParams(presence_penalty=1.0), 3, None)
    history.extend(0, [1, 2, 3, 9, 9])
    assert history.counts is not None
    assert (history.counts.ids.tolist(), history.counts.counts.tolist()) == ([9], [2.0])
    assert not history.forbidden() and not history.has_grammar


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40), size=st.integers(1, 4))
def test_a_run_that_stood_before_is_not_completed_again(tokens: list[int], size: int) -> None:
    history = History(SamplingParams(no_repeat_ngram_size=size), 1, None)
    history.extend(0, tokens)
    runs = {tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)}
    last = tokens[len(tokens) - size + 1 :]
    assert set(history.forbidden()) == {token for token in range(4) if (*last, token) in runs}


def test_a_grammar_is_compiled_when_it_is_first_needed_and_not_without_a_compiler() -> None:
    compiler = CountingCompiler(100)
    history = History(PARAMS, 1, compiler)
    history.extend(0, [1, 2])
    assert compiler.num_compiled == 0
    history.fill(np.zeros(4, np.uint32))
    history.fill(np.zeros(4, np.uint32))
    assert compiler.num_compiled == 1
    with pytest.raises(InvalidRequest, match=r"no grammar compiler.*tokenizer\.json"):
        History(PARAMS, 1, None).fill(np.zeros(4, np.uint32))

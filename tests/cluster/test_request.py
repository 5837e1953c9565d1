from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.protos import worker_pb2 as pb
from cluster.request import (
    Beams,
    EarlyStopping,
    Grammar,
    GrammarKind,
    Pooling,
    RequestKey,
    SamplingParams,
    TokenLogprobs,
)

tokens = st.integers(0, 2**32 - 1)
counts = st.integers(0, 2**32 - 1)
floats = st.floats(width=32, allow_nan=False)
sampling_params = st.builds(
    SamplingParams,
    max_tokens=counts,
    min_tokens=counts,
    temperature=floats,
    top_p=floats,
    top_k=counts,
    min_p=floats,
    seed=st.integers(0, 2**64 - 1),
    sample=counts,
    stop_token_ids=st.lists(tokens).map(tuple),
    ignore_eos=st.booleans(),
    presence_penalty=floats,
    frequency_penalty=floats,
    repetition_penalty=floats,
    logit_bias=st.lists(st.tuples(tokens, floats)).map(tuple),
    bad_words=st.lists(st.lists(tokens).map(tuple)).map(tuple),
    num_logprobs=st.none() | counts,
    num_prompt_logprobs=st.none() | counts,
    grammar=st.none() | st.builds(Grammar, st.sampled_from(GrammarKind), st.text()),
    pooling=st.none() | st.sampled_from(Pooling),
    no_repeat_ngram_size=counts,
    beams=st.none()
    | st.builds(
        Beams,
        st.integers(2, 2**32 - 1),
        st.integers(1, 2),
        st.floats(allow_nan=False),
        st.sampled_from(EarlyStopping),
    ),
)


@given(sampling_params)
def test_sampling_params_come_back_from_the_wire(params: SamplingParams) -> None:
    assert SamplingParams.of(pb.SamplingParams.FromString(params.wire().SerializeToString())) == params


def test_the_defaults_come_back_and_an_older_peer_means_them() -> None:
    assert SamplingParams.of(SamplingParams().wire()) == SamplingParams()
    older = pb.SamplingParams(max_tokens=16, top_p=1.0)  # before penalties, logprobs, grammars and pooling
    assert SamplingParams.of(older) == SamplingParams()


def test_a_value_of_a_later_version_is_refused() -> None:
    later = SamplingParams(pooling=Pooling.MEAN).wire()
    later.pooling = 77  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="77"):
        SamplingParams.of(later)
    later = SamplingParams(grammar=Grammar(GrammarKind.REGEX, "a*")).wire()
    later.grammar.kind = 78  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="78"):
        SamplingParams.of(later)
    for num_beams, num_returned in ((1, 1), (4, 5), (4, 0)):
        with pytest.raises(ValueError, match=f"{num_returned} texts of {num_beams} beams"):
            SamplingParams.of(SamplingParams(beams=Beams(num_beams, num_returned)).wire())


@given(floats, st.lists(st.tuples(tokens, floats)).map(tuple))
def test_logprobs_come_back_from_the_wire(logprob: float, top: tuple[tuple[int, float], ...]) -> None:
    entry = TokenLogprobs(logprob, top)
    assert TokenLogprobs.of(pb.TokenLogprobs.FromString(entry.wire().SerializeToString())) == entry


@given(st.text(), st.integers(0, 2**32 - 1))
def test_keys_come_back_from_the_wire(request_id: str, attempt: int) -> None:
    key = RequestKey(request_id, attempt)
    assert RequestKey.of(pb.RequestKey.FromString(key.wire().SerializeToString())) == key


@pytest.mark.parametrize(
    ("params", "penalties", "history", "whole_prompt"),
    [
        (SamplingParams(), False, False, False),
        (SamplingParams(min_p=0.5, logit_bias=((1, 1.0),), min_tokens=3, num_logprobs=5), False, False, False),
        (SamplingParams(presence_penalty=-1.0), True, True, False),
        (SamplingParams(frequency_penalty=0.1), True, True, False),
        (SamplingParams(repetition_penalty=0.9), True, True, False),
        (SamplingParams(bad_words=((1,),)), False, True, False),
        (SamplingParams(grammar=Grammar(GrammarKind.REGEX, "a")), False, True, False),
        (SamplingParams(num_prompt_logprobs=0), False, True, True),
        (SamplingParams(pooling=Pooling.LAST), False, False, False),
        (SamplingParams(pooling=Pooling.MEAN), False, False, True),
    ],
)
def test_what_params_need(params: SamplingParams, penalties: bool, history: bool, whole_prompt: bool) -> None:
    assert (params.has_penalties, params.needs_history, params.needs_whole_prompt) == (penalties, history, whole_prompt)

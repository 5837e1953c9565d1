from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.errors import InvalidRequest, RequestTooLong
from cluster.request import Pooling, RequestKey, SamplingParams
from tests.support.engines import limits
from workers.engine.block_manager import GroupCapacity
from workers.engine.sequence import Sequence

GROUPS = (GroupCapacity("self", 100, 4),)


def sequence(params: SamplingParams, tokens: list[int], num_prompt: int | None = None) -> Sequence:
    return Sequence(1, RequestKey("r", 0), tokens, len(tokens) if num_prompt is None else num_prompt, params, arrival=1)


@pytest.mark.parametrize(
    ("params", "tokens", "message", "name"),
    [
        (SamplingParams(), [1, 50], "token id 50: the model has 50", "prompt"),
        (SamplingParams(stop_token_ids=(3, 99)), [1], "token id 99", "stop_token_ids"),
        (SamplingParams(logit_bias=((-1, 1.0),)), [1], "token id -1", "logit_bias"),
        (SamplingParams(bad_words=((1, 2), (3, 70))), [1], "token id 70", "bad_words"),
        (SamplingParams(bad_words=((1, 2), ())), [1], "a bad word has no tokens", "bad_words"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(
    params: SamplingParams, tokens: list[int], message: str, name: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as raised:
        replace(limits(), vocab_size=50).check(sequence(params, tokens), GROUPS)
    assert raised.value.param == name


def test_the_last_token_of_the_vocabulary_is_one_of_it() -> None:
    params = SamplingParams(stop_token_ids=(0, 49), logit_bias=((49, 1.0),), bad_words=((49,), (0, 1)))
    replace(limits(), vocab_size=50).check(sequence(params, [0, 49]), GROUPS)


def test_an_embedding_needs_no_room_for_a_token_and_takes_none_before_it() -> None:
    pooled = SamplingParams(pooling=Pooling.LAST)
    limited = limits(max_model_len=8)
    limited.check(sequence(pooled, [1] * 8), GROUPS)
    with pytest.raises(RequestTooLong, match="9 tokens and 0 new are over max_model_len=8"):
        limited.check(sequence(pooled, [1] * 9), GROUPS)
    with pytest.raises(RequestTooLong, match="8 tokens and 1 new"):
        limited.check(sequence(SamplingParams(), [1] * 8), GROUPS)
    with pytest.raises(InvalidRequest, match="2 emitted tokens: an embedding is of a prompt alone"):
        limited.check(sequence(pooled, [1] * 6, num_prompt=4), GROUPS)

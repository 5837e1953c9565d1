"""Searches at the front door: what workers are asked, what is told of their finds, and what is refused."""

from __future__ import annotations

import pytest

from cluster.config import LimitsConfig
from cluster.request import Beams, EarlyStopping, FinishReason, Hypothesis, SamplingParams
from deploy.tokenizer import Tokenizer
from tests.support.api import PROMPT, FrontDoor, complete, error, front_door, post
from tests.support.scripted_worker import Find, ScriptedWorker


def found(tokenizer: Tokenizer, *texts: str) -> tuple[Hypothesis, ...]:
    """The first ends with a stop token, the others with their length."""
    ids = [tuple(tokenizer.backend.encode(text).ids) for text in texts]
    return tuple(
        Hypothesis(
            (*tokens, 9) if rank == 0 else tokens,
            -0.25 * (rank + 1),
            FinishReason.LENGTH if rank else FinishReason.STOP,
        )
        for rank, tokens in enumerate(ids)
    )


def test_choices_are_the_texts_that_were_found(door: FrontDoor, worker: ScriptedWorker, tokenizer: Tokenizer) -> None:
    hypotheses = found(tokenizer, "the quick 🦊", "jumps over", "never")
    worker.script = (Find(hypotheses),)
    asked = {"num_beams": 4, "n": 3, "length_penalty": 0.5, "early_stopping": True, "no_repeat_ngram_size": 2}
    told = complete(door, **asked, stop_token_ids=[9], return_token_ids=True).json()
    choices = told["choices"]
    assert [choice["text"] for choice in choices] == ["the quick 🦊", "jumps over", "never"]
    assert [choice["token_ids"] for choice in choices] == [list(each.token_ids) for each in hypotheses]
    assert [(each["index"], each["score"]) for each in choices] == [(0, -0.25), (1, -0.5), (2, -0.75)]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "length", "length"]
    assert told["usage"]["completion_tokens"] == sum(len(each.token_ids) for each in hypotheses)
    sampling = SamplingParams.of(worker.submits[-1].sampling)
    assert sampling.beams == Beams(4, 3, 0.5, EarlyStopping.AT_ONCE)
    assert (sampling.no_repeat_ngram_size, sampling.temperature) == (2, 0.0)

    prompts = complete(
        door,
        prompt=[PROMPT, PROMPT, [7]],
        num_beams=4,
        num_return_sequences=3,
        early_stopping="never",
        stop_token_ids=[9],
    )
    indexes = {(choice["index"], choice["text"]) for choice in prompts.json()["choices"]}
    assert indexes == {(3 * prompt + rank, choices[rank]["text"]) for prompt in range(3) for rank in range(3)}
    beams = SamplingParams.of(worker.submits[-1].sampling).beams
    assert beams is not None and beams.early_stopping is EarlyStopping.IMPOSSIBLE


def test_a_search_may_find_less_than_was_asked_for(
    door: FrontDoor, worker: ScriptedWorker, tokenizer: Tokenizer
) -> None:
    worker.script = (Find(found(tokenizer, "one")),)
    told = complete(door, prompt=[PROMPT, [7]], num_beams=2, n=2).json()
    assert [choice["index"] for choice in told["choices"]] == [0, 2]
    assert complete(door).json()["choices"][0].get("score") is None


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"num_beams": 4, "stream": True}, "known at the end only; remove stream or num_beams"),
        ({"num_beams": 2, "n": 3}, "num_beams: 2 do not find 3 texts"),
        ({"num_beams": 4, "n": 2, "num_return_sequences": 3}, "n: 2 is not num_return_sequences = 3"),
        ({"num_beams": 4, "temperature": 0.7}, "temperature: 0.7 with num_beams, which draws nothing"),
        ({"num_beams": 4, "stop": "a"}, "stop does not go with num_beams"),
        ({"num_beams": 4, "best_of": 4}, "best_of does not go with num_beams"),
        ({"num_beams": 4, "logprobs": 0}, "logprobs does not go with num_beams"),
        ({"num_beams": 4, "prompt_logprobs": 0}, "prompt_logprobs does not go with num_beams"),
        ({"num_beams": 4, "max_tokens": 0, "echo": True}, "max_tokens: 0 does not go with num_beams"),
        ({"length_penalty": 1.0}, "length_penalty needs num_beams of 2 or more"),
        ({"num_return_sequences": 2}, "num_return_sequences needs num_beams"),
        ({"num_beams": 1, "early_stopping": False}, "early_stopping needs num_beams"),
        ({"num_beams": 33}, "num_beams: 33 is over the limit of 32"),
        ({"num_beams": 4, "early_stopping": "soon"}, "early_stopping"),
        ({"num_beams": 4, "length_penalty": 11}, "length_penalty"),
    ],
)
def test_what_is_refused(door: FrontDoor, worker: ScriptedWorker, asked: dict[str, object], told: str) -> None:
    assert told in error(complete(door, **asked), 400)["message"]
    assert worker.submits == []


def test_chat_does_not_search(door: FrontDoor) -> None:
    refused = error(post(door, "/v1/chat/completions", messages=[{"role": "user", "content": "a"}], num_beams=2), 400)
    assert "num_beams" in refused["message"]


def test_a_limit_of_samples_is_one_of_beams(tokenizer: Tokenizer, worker: ScriptedWorker) -> None:
    with front_door(tokenizer, limits=LimitsConfig(max_samples=3)) as small:
        small.connect(worker)
        assert "num_beams: 4 is over the limit of 3" in error(complete(small, num_beams=4), 400)["message"]

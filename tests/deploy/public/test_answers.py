"""Every parameter that changes an answer, through the public port, against real workers and transformers."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from cluster.request import SamplingParams
from tests.support.plain_sampler import generate
from tests.support.public_door import BLOCK_SIZE, MODEL, PublicDoor

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

TEXT = "def main() -> None:\n    print('the quick brown fox')"

Forward = Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def forward(door: PublicDoor) -> Forward:
    """Logits [T, V] and final hidden states [T, D] of transformers' own model.

    In float64: in float32 transformers is off by 1e-4 itself where a log-probability is −20, and the two errors add up.
    """
    model = AutoModelForCausalLM.from_pretrained(
        str(door.checkpoint), dtype=torch.float64, experts_implementation="eager"
    )

    def run(token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            out = model(torch.tensor([token_ids]), output_hidden_states=True)
        return out.logits[0], out.hidden_states[-1][0]

    return run


def test_logprobs_and_echo_equal_transformers(door: PublicDoor, forward: Forward) -> None:
    """The prompt's, too, which was computed before: nothing is read off a cached block."""
    prompt = door.ids(TEXT)
    for _ in range(2):
        answer = door.complete(prompt=TEXT, max_tokens=12, logprobs=3, echo=True, return_token_ids=True)
        (choice,) = answer["choices"]
        token_ids = [*prompt, *choice["token_ids"]]
        assert len(choice["token_ids"]) == 12 and choice["text"] == TEXT + door.tokenizer.decode(choice["token_ids"])
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        expected = forward(token_ids)[0].log_softmax(-1)
        rows = torch.arange(len(token_ids) - 1)
        assert told["token_logprobs"][1:] == pytest.approx(expected[rows, token_ids[1:]].tolist(), rel=0, abs=1e-4)
        for row, (own, top) in enumerate(zip(token_ids[1:], told["top_logprobs"][1:], strict=True)):
            best = expected[row].topk(3)
            texts = {
                door.tokenizer.texts.text_of(token): expected[row, token].item() for token in best.indices.tolist()
            }
            texts[door.tokenizer.texts.text_of(own)] = expected[row, own].item()
            assert top == pytest.approx(texts, rel=0, abs=1e-4)
        assert told["tokens"] == [door.tokenizer.texts.text_of(token) for token in token_ids]
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
            assert token.startswith("bytes:") or choice["text"].startswith(token, offset)
        parts = [
            chunk["choices"][0]
            for chunk in door.stream("/v1/completions", prompt=TEXT, max_tokens=12, logprobs=3, echo=True)
        ]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in told.items():
            assert [value for part in parts for value in part["logprobs"][name]] == values


def test_a_prompt_is_scored_without_an_answer(door: PublicDoor) -> None:
    scored = door.complete(prompt=TEXT, max_tokens=0, echo=True, logprobs=1)
    assert scored["choices"][0]["text"] == TEXT and scored["usage"]["completion_tokens"] == 0
    longer = door.complete(prompt=TEXT, max_tokens=3, echo=True, logprobs=1)["choices"][0]["logprobs"]
    short = scored["choices"][0]["logprobs"]
    assert {name: values[: len(short["tokens"])] for name, values in longer.items()} == short


@pytest.mark.parametrize(("num_logprobs", "num_prompt_logprobs"), [(1, 3), (3, 1)])
def test_the_echo_and_the_prompt_tell_as_many_as_each_was_asked_for(
    door: PublicDoor, num_logprobs: int, num_prompt_logprobs: int
) -> None:
    counts = {"logprobs": num_logprobs, "prompt_logprobs": num_prompt_logprobs}
    (choice,) = door.complete(prompt=TEXT, max_tokens=1, echo=True, **counts)["choices"]
    _, *tops = choice["logprobs"]["top_logprobs"]
    assert all(num_logprobs <= len(top) <= num_logprobs + 1 for top in tops)  # the token itself is always told
    assert all(len(each["top_logprobs"]) == num_prompt_logprobs for each in choice["prompt_logprobs"][1:])


def test_chat_logprobs_tell_bytes_that_add_up(door: PublicDoor) -> None:
    answer = door.chat("hi", max_tokens=24, temperature=1.9, seed=5, logprobs=True, top_logprobs=2, prompt_logprobs=1)
    (choice,) = answer["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 24 and choice["logprobs"]["refusal"] is None and choice["message"]["refusal"] is None
    data = b"".join(bytes(each["bytes"]) for each in content)
    assert data.decode("utf-8", "replace") == choice["message"]["content"]
    assert all(len(each["top_logprobs"]) == 2 for each in content)
    assert all(each["top_logprobs"][0]["logprob"] >= each["logprob"] for each in content)
    first, *others = choice["prompt_logprobs"]
    assert first is None and len(others) == answer["usage"]["prompt_tokens"] - 1
    assert all(len(each["top_logprobs"]) == 1 for each in others)


def test_samples_differ_share_the_prompt_and_do_not_depend_on_each_other(door: PublicDoor) -> None:
    prompt = [*range(100, 100 + 5 * BLOCK_SIZE)]
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 1.0, "seed": 3, "return_token_ids": True}
    several = door.complete(**body, n=4, return_route=True)
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    said = [tuple(choice["token_ids"]) for choice in several["choices"]]
    assert len(set(said)) == 4
    usage = several["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), 32)
    blocks = [route["blocks"] for route in usage["sluice_sequences"]]
    assert blocks[0] == 5 and sum(blocks) < 4 * 5  # what the leader holds is not moved again
    alone = door.complete(**body)
    assert tuple(alone["choices"][0]["token_ids"]) == said[0]
    streamed: dict[int, list[int]] = {0: [], 1: [], 2: [], 3: []}
    finished: list[int] = []
    for chunk in door.stream("/v1/completions", **body, n=4):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["token_ids"]
            finished += [choice["index"]] if choice["finish_reason"] else []
    assert [tuple(ids) for ids in streamed.values()] == said and sorted(finished) == [0, 1, 2, 3]


def test_the_best_are_those_with_the_largest_mean_logprob(door: PublicDoor, forward: Forward) -> None:
    """As transformers counts it, before temperature."""
    prompt = door.ids(TEXT)
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 1.5, "seed": 11, "return_token_ids": True}

    def mean(token_ids: list[int]) -> float:
        logprobs = forward([*prompt, *token_ids])[0].log_softmax(-1)[len(prompt) - 1 : -1]
        return logprobs[range(len(token_ids)), token_ids].mean().item()

    every = [choice["token_ids"] for choice in door.complete(**body, n=5)["choices"]]
    best = door.complete(**body, n=2, best_of=5)
    assert [choice["token_ids"] for choice in best["choices"]] == sorted(every, key=mean, reverse=True)[:2]
    assert [choice["index"] for choice in best["choices"]] == [0, 1] and best["choices"][0]["logprobs"] is None
    assert best["usage"]["completion_tokens"] == 30


def test_several_prompts_are_answered_as_if_alone(door: PublicDoor) -> None:
    texts = [TEXT, "import os", "class Fox:"]
    together = door.complete(prompt=texts, max_tokens=5, n=2, temperature=0.8, seed=1)
    alone = [door.complete(prompt=text, max_tokens=5, n=2, temperature=0.8, seed=1) for text in texts]
    assert [c["text"] for c in together["choices"]] == [c["text"] for one in alone for c in one["choices"]]
    assert together["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone)
    ids = door.complete(prompt=[door.ids(text) for text in texts], max_tokens=5, n=2, temperature=0.8, seed=1)
    assert [c["text"] for c in ids["choices"]] == [c["text"] for c in together["choices"]]


def test_what_changes_the_logits_changes_the_answer(door: PublicDoor) -> None:
    body = {"prompt": TEXT, "max_tokens": 16, "return_token_ids": True}

    def ids(**options: Any) -> list[int]:
        return door.complete(**body, **options)["choices"][0]["token_ids"]

    plain = ids()
    banned = plain[3]
    assert banned not in ids(logit_bias={str(banned): -100})
    assert set(ids(logit_bias={str(banned): 100})) == {banned}
    assert banned not in ids(bad_words=[[banned]])
    pair = plain[2:4]
    without = ids(bad_words=[pair])
    assert without[:3] == plain[:3] and pair not in [without[i : i + 2] for i in range(15)]
    biased = {"logit_bias": {str(banned): 100, str(plain[0]): 100}}
    assert set(ids(**biased)) <= {banned, plain[0]}
    assert set(ids(**biased, frequency_penalty=2.0)) == {banned, plain[0]}
    assert len(set(ids(presence_penalty=2.0))) >= len(set(plain))
    assert ids(repetition_penalty=50.0) != plain or len(set(plain)) == 16
    assert ids(temperature=2.0, min_p=1.0, seed=1) == plain and ids(temperature=2.0, top_k=1, seed=2) == plain


def test_penalties_and_sampling_equal_transformers(door: PublicDoor, forward: Forward) -> None:
    """Token for token, by transformers' own logits and processors, where the model is made to repeat itself."""
    prompt = door.ids(TEXT)
    said = door.complete(prompt=prompt, max_tokens=6, return_token_ids=True)["choices"][0]["token_ids"]
    bias = tuple((token, 12.0) for token in sorted(set(said)))

    @cache
    def scores(token_ids: tuple[int, ...]) -> torch.Tensor:
        return forward(token_ids)[0][-1]

    def both(**options: Any) -> list[int]:
        params = SamplingParams(max_tokens=10, logit_bias=bias, **options)
        expected = generate(lambda tokens: scores(tuple(tokens)), prompt, params)
        sent = {"logit_bias": {str(token): value for token, value in bias}, "max_tokens": 10, **options}
        assert door.complete(prompt=prompt, return_token_ids=True, **sent)["choices"][0]["token_ids"] == expected, sent
        return expected

    greedy, drawn = {"temperature": 0}, {"temperature": 1.9, "seed": 5}
    likeliest, sampled = both(**greedy), both(**drawn)
    assert likeliest != sampled
    for name, value in (("presence", 2.0), ("frequency", 1.5), ("repetition", 4.0), ("repetition", 0.4)):
        assert both(**greedy, **{f"{name}_penalty": value}) != likeliest, name
    for name, value in (("top_k", 5), ("top_p", 0.5), ("min_p", 0.2)):
        assert both(**drawn, **{name: value}) != sampled, name


def test_no_character_is_broken(door: PublicDoor) -> None:
    """Each takes several tokens, which come one by one; a text that begins with two thirds of one is told so."""
    wanted = "🦊é東 ﷽"
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [wanted]}}}
    messages = [{"role": "user", "content": "hi"}]
    chunks = door.stream(
        "/v1/chat/completions", messages=messages, response_format=schema, max_tokens=60, return_token_ids=True,
        ignore_eos=False,
    )  # fmt: skip
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    texts = [choice["delta"].get("content") or "" for choice in choices]
    assert json.loads("".join(texts)) == wanted and not any("\ufffd" in text for text in texts)
    assert sum(len(choice.get("token_ids") or ()) for choice in choices) > sum(text != "" for text in texts)
    cut = door.ids(wanted)[:2]
    bias = {str(cut[0]): 100}
    assert door.complete(prompt=TEXT, max_tokens=1, logit_bias=bias)["choices"][0]["text"] == "\ufffd"


def test_a_stop_string_cuts_everything_at_one_token(door: PublicDoor) -> None:
    """It spans tokens; text, ids, logprobs and usage end together, streamed or not."""
    whole = door.complete(prompt=TEXT, max_tokens=30)["choices"][0]["text"]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 6]
    body = {"prompt": TEXT, "max_tokens": 30, "stop": [stop], "logprobs": 1, "return_token_ids": True}
    answer = door.complete(**body)
    (choice,) = answer["choices"]
    assert choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"
    num_tokens = len(choice["token_ids"])
    assert stop in door.tokenizer.decode(choice["token_ids"])
    assert stop not in door.tokenizer.decode(choice["token_ids"][:-1])
    assert {len(values) for values in choice["logprobs"].values()} == {num_tokens}
    assert answer["usage"]["completion_tokens"] == num_tokens < 30
    shown = door.complete(**body, include_stop_str_in_output=True)["choices"][0]["text"]
    assert shown == choice["text"] + stop
    *chunks, last = door.stream("/v1/completions", **body, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks) and last["choices"] == []
    assert last["usage"]["completion_tokens"] == num_tokens
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == choice["text"]
    assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
    joined = {name: [v for part in parts for v in part["logprobs"][name]] for name in choice["logprobs"]}
    assert joined == choice["logprobs"]


def test_stop_strings_wait_for_min_tokens(door: PublicDoor) -> None:
    (fox,) = door.ids(" if")
    body = {"prompt": TEXT, "max_tokens": 9, "logit_bias": {str(fox): 100}, "stop": "if"}
    for min_tokens, text in ((0, " "), (1, " "), (5, " if" * 4 + " ")):
        answer = door.complete(**body, min_tokens=min_tokens)
        assert answer["choices"][0]["text"] == text and answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == max(1, min_tokens)


def test_the_token_that_says_stop_is_no_text(door: PublicDoor) -> None:
    """It is counted and its id is told; where another token came last, that one is text."""
    body = {"prompt": TEXT, "max_tokens": 6, "return_token_ids": True, "ignore_eos": False}
    whole = door.complete(**body)["choices"][0]
    third = whole["token_ids"][2]
    (eos,) = door.ids("<|end|>")
    for options, told in (
        ({"stop_token_ids": [third]}, whole["token_ids"][:3]),
        ({"logit_bias": {str(eos): 100}}, [eos]),
    ):
        answer = door.complete(**body, **options)
        (choice,) = answer["choices"]
        assert choice["token_ids"] == told and choice["text"] == door.tokenizer.decode(told[:-1])
        assert choice["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == len(told)


def test_every_event_may_tell_the_usage_so_far_and_the_last_the_route(door: PublicDoor) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    common = {"max_tokens": 5, "return_token_ids": True, "return_route": True, "stream_options": options}
    bodies = {
        "/v1/completions": {"prompt": TEXT},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    }
    for path, body in bodies.items():
        *chunks, last = door.stream(path, **body, **common)
        counts = [len(choice.get("token_ids") or ()) for chunk in chunks for choice in chunk["choices"]]
        told = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert told[-1] == last["usage"]["completion_tokens"] == sum(counts) == 5
        assert told == sorted(told) if path != "/v1/completions" else told == list(accumulate(counts))
        assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {last["usage"]["prompt_tokens"]}
        route = last["usage"]["sluice"]
        assert last["choices"] == [] and route["plan"] == "disaggregated" and route["transport"] == "nixl"
        assert route["ttft_ms"] > 0 and route["itl_ms"] >= 0 and route["prefill"]["pid"] != route["decode"]["pid"]


def test_embeddings_equal_transformers(door: PublicDoor, forward: Forward) -> None:
    texts = [TEXT, "import os", TEXT * 4]
    for pooling in ("last", "mean"):
        answer = door.post("/v1/embeddings", input=texts, pooling=pooling).json()
        assert [each["index"] for each in answer["data"]] == [0, 1, 2] and answer["model"] == MODEL
        num_tokens = sum(len(door.ids(text)) for text in texts)
        assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        for text, each in zip(texts, answer["data"], strict=True):
            _, hidden = forward(door.ids(text))
            state = hidden[-1] if pooling == "last" else hidden.mean(0)
            assert each["embedding"] == pytest.approx((state / state.norm()).tolist(), abs=2e-4)
            assert math.isclose(sum(value**2 for value in each["embedding"]), 1, rel_tol=1e-5)
    ids = [door.ids(text) for text in texts]
    packed = door.post("/v1/embeddings", input=ids, encoding_format="base64", dimensions=96).json()
    floats = door.post("/v1/embeddings", input=ids).json()
    for one, other in zip(packed["data"], floats["data"], strict=True):
        assert np.frombuffer(base64.b64decode(one["embedding"]), "<f4") == pytest.approx(other["embedding"], abs=1e-4)


def test_tokens_there_and_back(door: PublicDoor) -> None:
    text = "naïve 🦊 <|end|>"
    told = door.post("/tokenize", prompt=text).json()
    assert told == {"tokens": door.ids(text), "count": len(door.ids(text)), "max_model_len": 2048}
    assert door.post("/detokenize", tokens=told["tokens"]).json() == {"prompt": text}
    chat = door.post("/tokenize", messages=[{"role": "user", "content": "hi"}]).json()["tokens"]
    assert door.post("/detokenize", tokens=chat).json()["prompt"] == "<|user|>hi<|end|><|assistant|>"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    going_on = door.post("/tokenize", messages=messages, continue_final_message=True).json()["tokens"]
    assert door.post("/detokenize", tokens=going_on).json()["prompt"] == "<|user|>hi<|end|><|assistant|>ho"


def test_every_answer_has_one_request_id(door: PublicDoor) -> None:
    for path, body in (("/v1/completions", {"prompt": "a", "max_tokens": 1}), ("/v1/completions", {"prompt": 7})):
        for sent in ("!my-id~" + "x" * 121, None):
            headers = {"x-request-id": sent} if sent else {}
            answer = door.client.post(path, json={"model": MODEL, **body}, headers=headers)
            (told,) = answer.headers.get_list("x-request-id")
            assert told == sent if sent else len(told) >= 32
    same = [door.client.post("/v1/completions", json={"model": MODEL, "prompt": "a"}, headers={"x-request-id": "one"})
            for _ in range(2)]  # fmt: skip
    assert len({answer.json()["id"] for answer in same}) == 2

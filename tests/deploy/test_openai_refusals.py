"""What the HTTP API refuses: a status, the parameter, the offending value and the remedy."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from cluster.config import LimitsConfig
from cluster.protos import worker_pb2 as pb
from deploy.tokenizer import Tokenizer
from tests.support.api import PROMPT, FrontDoor, complete, error, front_door
from tests.support.scripted_worker import FOREVER, Action, Fail, Say, ScriptedWorker, Wait


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temper": 1}, "temper", "unrecognized request argument supplied: temper; remove it"),
        ({"temperature": 2.5}, "temperature", "temperature: Input should be less than or equal to 2; got 2.5"),
        ({"top_p": 0}, "top_p", "top_p: Input should be greater than 0; got 0"),
        ({"max_tokens": 0}, None, "max_tokens: 0 needs echo: true"),
        ({"max_tokens": "8"}, "max_tokens", 'max_tokens: Input should be a valid integer; got "8"'),
        ({"min_tokens": 9}, "min_tokens", "min_tokens: 9 is over max_tokens = 8"),
        ({"n": 33}, "n", "n: 33 is over the limit of 32; send several requests"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2; got 2.5"),
        ({"stop": [""]}, "stop", "an empty stop string would end everything at once; remove it"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
        ({"prompt": []}, "prompt", "a text, a list of token ids that is not empty, or a list of either"),
        ({"prompt": ["a", [5]]}, "prompt", "or a list of either; send one of these"),
        ({"prompt": [1, 400]}, "prompt", "token id 400 is outside the vocabulary of 400"),
        ({"prompt": ""}, "prompt", "it has no tokens; send some text"),
        ({"timeout_s": 61}, "timeout_s", "timeout_s: 61 is over the limit of 60 s"),
        ({"stream_options": {"include_usage": True}}, None, "stream_options needs stream: true"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options",
            "continuous_usage_stats needs include_usage: true",
        ),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unrecognized request argument"),
    ],
)
def test_a_bad_parameter_is_named_with_the_remedy(
    door: FrontDoor, worker: ScriptedWorker, change: dict[str, Any], param: str | None, message: str
) -> None:
    before = door.outcomes("invalid")
    refused = error(complete(door, **change), 400)
    assert message in refused["message"] and refused["type"] == "invalid_request_error"
    assert refused["param"] == param
    assert door.outcomes("invalid") == before + 1 and worker.submits == []


def test_neutral_parameters_are_accepted(door: FrontDoor) -> None:
    neutral = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "user": "me", "echo": False}
    assert complete(door, **neutral, best_of=1, suffix="", logprobs=None, prompt=[PROMPT]).status_code == 200


@pytest.mark.parametrize("content", [b"{", b"[]", b"7", b""])
def test_a_body_that_is_no_request(door: FrontDoor, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    refused = error(httpx.post(f"{door.url}/v1/completions", content=content, headers=headers), 400)
    assert (refused["type"] == "invalid_request_error" and "JSON" in refused["message"]) or "provide" in refused[
        "message"
    ]


def test_too_long_is_413(door: FrontDoor, tokenizer: Tokenizer, worker: ScriptedWorker) -> None:
    refused = error(complete(door, prompt=[1] * 512), 413)
    assert refused["code"] == "context_length_exceeded" and "context of 512" in refused["message"]
    assert "ask for at most 12" in error(complete(door, prompt=[1] * 500, max_tokens=13), 413)["message"]
    assert complete(door, prompt=[1] * 500, max_tokens=12).status_code == 200
    with front_door(tokenizer, limits=LimitsConfig(max_prompt_tokens=10, max_body_bytes=500)) as small:
        small.connect(worker)
        assert "11 tokens are over the limit of 10" in error(complete(small, prompt=[1] * 11), 413)["message"]
        assert error(complete(small, prompt="x" * 600), 413)["code"] == "body_too_large"
        body = json.dumps({"model": "tiny", "prompt": "x" * 600}).encode()
        chunked = httpx.post(f"{small.url}/v1/completions", content=iter([body[:300], body[300:]]))
        assert error(chunked, 413)["code"] == "body_too_large"


def test_an_unknown_model_is_404(door: FrontDoor) -> None:
    refused = error(complete(door, model="gpt"), 404)
    assert refused["code"] == "model_not_found" and "use 'tiny'" in refused["message"]


def test_a_wrong_key_is_401(tokenizer: Tokenizer, worker: ScriptedWorker) -> None:
    with front_door(tokenizer, api_keys=frozenset({"right", "other"})) as door:
        door.connect(worker)
        assert error(complete(door), 401)["code"] == "invalid_api_key"
        for key in ("wrong", "rightx"):
            client = openai.OpenAI(base_url=f"{door.url}/v1", api_key=key, max_retries=0)
            with pytest.raises(openai.AuthenticationError):
                client.completions.create(model="tiny", prompt=PROMPT)
        client = openai.OpenAI(base_url=f"{door.url}/v1", api_key="right", max_retries=0)
        assert client.completions.create(model="tiny", prompt=PROMPT).choices[0].finish_reason == "length"
        assert httpx.get(f"{door.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("script", "status", "outcome"),
    [
        ([Fail(pb.BUSY)], 429, "busy"),
        ([Fail(pb.INTERNAL)], 500, "failed"),
        ([Fail(pb.DEADLINE)], 504, "deadline"),
        ([Fail(pb.TOO_LONG)], 413, "invalid"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_before_the_first_token_have_their_status(
    door: FrontDoor, worker: ScriptedWorker, script: list[Action], status: int, outcome: str, stream: bool
) -> None:
    worker.script = script
    before = door.outcomes(outcome)
    response = complete(door, stream=stream)
    error(response, status)
    assert ("retry-after" in response.headers) == (status == 429)
    assert door.outcomes(outcome) == before + 1


def test_no_worker_is_503_and_health_says_so(door: FrontDoor, worker: ScriptedWorker) -> None:
    assert httpx.get(f"{door.url}/health").json() == {"status": "ok"}
    door.connect()
    sick = httpx.get(f"{door.url}/health")
    assert sick.status_code == 503 and sick.json()["reason"] == "no decode worker is ready"
    assert "no decode worker is ready (waited 0.3 s)" in error(complete(door), 503)["message"]


def test_a_deadline_is_504(door: FrontDoor, worker: ScriptedWorker) -> None:
    worker.script = [Wait()]
    assert "deadline" in error(complete(door, timeout_s=0.1), 504)["message"]


def test_a_full_house_is_429_at_once(tokenizer: Tokenizer, worker: ScriptedWorker) -> None:
    worker.script = [Say(1), Wait(), FOREVER]
    with front_door(tokenizer, limits=LimitsConfig(max_requests=1)) as door:
        door.connect(worker)
        body = {"model": "tiny", "prompt": PROMPT, "stream": True}
        with httpx.stream("POST", f"{door.url}/v1/completions", json=body, timeout=30) as first:
            assert first.status_code == 200
            refused = complete(door)
            assert error(refused, 429)["code"] == "queue_full" and int(refused.headers["retry-after"]) >= 1
            worker.go_on()
            first.read()

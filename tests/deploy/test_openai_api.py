"""The HTTP API on a real port: httpx and OpenAI's own client against scripted workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from cluster.config import LimitsConfig, Role
from cluster.protos import worker_pb2 as pb
from deploy.tokenizer import Tokenizer
from tests.support.api import FrontDoor, front_door
from tests.support.scripted_worker import FOREVER, Action, Die, Fail, Say, ScriptedWorker, Stop, Wait, all_tokens
from tests.support.tokenizer_files import write_tokenizer

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    loaded = Tokenizer.load(directory)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def shared_door(tokenizer: Tokenizer) -> Iterator[FrontDoor]:
    with front_door(tokenizer) as door:
        yield door


@pytest.fixture
def worker(tokenizer: Tokenizer) -> Iterator[ScriptedWorker]:
    """Says a sentence, over and over, with characters that take several tokens."""
    with_text = ScriptedWorker("decode-0")
    with_text.text = tokenizer.backend.encode("the quick 🦊 jumps; never stop here. ").ids
    yield with_text
    with_text.stop()


@pytest.fixture
def door(shared_door: FrontDoor, worker: ScriptedWorker) -> FrontDoor:
    shared_door.connect(worker)
    return shared_door


def post(door: FrontDoor, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{door.url}{path}", json={"model": "tiny", **body}, timeout=30)


def complete(door: FrontDoor, **body: Any) -> httpx.Response:
    return post(door, "/v1/completions", **{"prompt": PROMPT, "max_tokens": 8, **body})


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a whole stream, which ends as OpenAI's do."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text_of(worker: ScriptedWorker, tokenizer: Tokenizer, count: int) -> str:
    told = worker.text or []
    return tokenizer.backend.decode([told[i % len(told)] for i in range(count)])


# ---------------------------------------------------------------- answers


def test_openais_client_completes_a_text(door: FrontDoor, worker: ScriptedWorker, tokenizer: Tokenizer) -> None:
    client = openai.OpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)
    answer = client.completions.create(model="tiny", prompt="the lazy dog", max_tokens=20, temperature=0)
    assert answer.choices[0].text == text_of(worker, tokenizer, 20)
    assert answer.choices[0].finish_reason == "length" and answer.id.startswith("cmpl-")
    sent = worker.submits[-1]
    assert list(sent.prompt_token_ids) == tokenizer.backend.encode("the lazy dog").ids
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(sent.prompt_token_ids), 20)
    assert answer.usage.prompt_tokens_details is not None and answer.usage.prompt_tokens_details.cached_tokens == 2


def test_openais_client_streams_a_chat(door: FrontDoor, worker: ScriptedWorker, tokenizer: Tokenizer) -> None:
    client = openai.OpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ],
        max_completion_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == text_of(worker, tokenizer, 20) and not any("\ufffd" in text for text in texts[:-1])
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert {c.object for c in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 20
    template = "<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"
    assert tokenizer.backend.decode(list(worker.submits[-1].prompt_token_ids), skip_special_tokens=False) == template


def test_a_chat_in_one_piece(door: FrontDoor, worker: ScriptedWorker, tokenizer: Tokenizer) -> None:
    """Without max_tokens it may use all that the context leaves."""
    worker.script = [Say(3), Stop()]
    answer = post(door, "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}]).json()
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": text_of(worker, tokenizer, 3)}
    assert choice["finish_reason"] == "stop" and "token_ids" not in choice
    sent = worker.submits[-1]
    assert sent.sampling.max_tokens == 512 - len(sent.prompt_token_ids)


def test_token_ids_in_and_out(door: FrontDoor, worker: ScriptedWorker) -> None:
    worker.text = None
    worker.script = [Say(3), Say(5, together=True)]
    whole = complete(door, return_token_ids=True).json()
    assert whole["choices"][0]["token_ids"] == all_tokens(PROMPT, 8)
    worker.script = [Say(3), Say(5, together=True)]
    streamed = events(complete(door, return_token_ids=True, stream=True))
    ids = [token for chunk in streamed for choice in chunk["choices"] for token in choice["token_ids"]]
    assert ids == all_tokens(PROMPT, 8)
    assert "".join(c["choices"][0]["text"] for c in streamed) == whole["choices"][0]["text"]
    assert {chunk["object"] for chunk in streamed} == {"text_completion"}
    assert all("usage" not in chunk for chunk in streamed)


def test_what_is_asked_for_reaches_the_worker(door: FrontDoor, worker: ScriptedWorker) -> None:
    options = {"temperature": 0.5, "top_p": 0.75, "top_k": 7, "seed": -1, "min_tokens": 2, "stop_token_ids": [3]}
    assert complete(door, **options, ignore_eos=True, priority=-4, timeout_s=5).status_code == 200
    sent = worker.submits[-1]
    assert sent.sampling == pb.SamplingParams(
        max_tokens=8,
        min_tokens=2,
        temperature=0.5,
        top_p=0.75,
        top_k=7,
        seed=2**64 - 1,
        stop_token_ids=[3],
        ignore_eos=True,
    )
    assert sent.priority == -4 and 0 < sent.deadline_ms <= 5000
    complete(door)
    complete(door)
    first, second = (submit.sampling.seed for submit in worker.submits[-2:])
    assert first != second  # drawn


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_text_tokens_and_usage(
    door: FrontDoor, worker: ScriptedWorker, tokenizer: Tokenizer, stream: bool
) -> None:
    """`never stop` spans tokens; what comes after it is neither shown nor counted, and the worker is told."""
    worker.script = [Say(30), Wait()]
    body = {"max_tokens": 200, "stop": ["nowhere", "never stop"], "return_token_ids": True, "stream": stream}
    if stream:
        *chunks, last = events(complete(door, **body, stream_options={"include_usage": True}))
        choices = [chunk["choices"][0] for chunk in chunks]
        usage = last["usage"]
    else:
        answer = complete(door, **body).json()
        choices, usage = answer["choices"], answer["usage"]
    assert "".join(choice["text"] for choice in choices) == "the quick 🦊 jumps; "
    assert choices[-1]["finish_reason"] == "stop"
    ids = [token for choice in choices for token in choice["token_ids"]]
    whole = tokenizer.backend.decode(ids)
    assert whole.startswith("the quick 🦊 jumps; never stop") and "never stop" not in tokenizer.backend.decode(ids[:-1])
    assert usage["completion_tokens"] == len(ids)
    worker.wait(lambda w: len(w.cancels) == 1)


def test_the_token_that_says_stop_is_no_text(door: FrontDoor, worker: ScriptedWorker, tokenizer: Tokenizer) -> None:
    """It is counted and its id is told; where another token came last, that one is text."""
    assert worker.text is not None
    worker.script = [Say(3), Stop()]
    plain = complete(door, return_token_ids=True).json()
    ended = complete(door, return_token_ids=True, stop_token_ids=[worker.text[2]]).json()
    assert plain["choices"][0]["text"] == text_of(worker, tokenizer, 3)
    assert ended["choices"][0]["text"] == text_of(worker, tokenizer, 2)
    for answer in (plain, ended):
        assert answer["choices"][0]["token_ids"] == worker.text[:3]
        assert answer["usage"]["completion_tokens"] == 3 and answer["choices"][0]["finish_reason"] == "stop"


def test_stop_strings_wait_for_min_tokens(door: FrontDoor, worker: ScriptedWorker, tokenizer: Tokenizer) -> None:
    answer = complete(door, max_tokens=40, min_tokens=12, stop="quick").json()
    text = answer["choices"][0]["text"]
    assert text.count("quick") == 1 and answer["choices"][0]["finish_reason"] == "stop"


def test_the_route_is_told_when_asked_for(tokenizer: Tokenizer) -> None:
    prefill = ScriptedWorker("prefill-0", roles=[Role.PREFILL])
    decode = ScriptedWorker("decode-0", sources=[prefill])
    try:
        with front_door(tokenizer, local_prefill="never") as door:
            door.connect(prefill, decode)
            route = complete(door, return_route=True).json()["usage"]["sluice"]
            assert route["plan"] == "disaggregated" and route["attempts"] == 1 and not route["local_prefill"]
            assert route["prefill"] == {"name": "prefill-0", "incarnation": prefill.incarnation, "pid": 4712}
            assert route["decode"] == {"name": "decode-0", "incarnation": decode.incarnation, "pid": 4711}
            assert (route["transport"], route["blocks"], route["bytes"]) == ("loopback", 3, 3000)
            assert route["ttft_ms"] > 0 and route["itl_ms"] >= 0 and route["prefix_hit_tokens"] == 2
            *_, last = events(complete(door, return_route=True, stream=True))
            assert last["choices"] == [] and last["usage"]["sluice"]["prefill"] == route["prefill"]
    finally:
        decode.stop()
        prefill.stop()


def test_without_a_tokenizer_token_ids_are_enough(worker: ScriptedWorker) -> None:
    worker.text = None
    with front_door(None) as door:
        door.connect(worker)
        choice = complete(door).json()["choices"][0]
        assert choice["token_ids"] == all_tokens(PROMPT, 8) and choice["text"] == ""
        assert "no tokenizer; send token ids" in error(complete(door, prompt="hello"), 400)["message"]
        assert error(complete(door, stop="x"), 400)["param"] == "stop"


def test_models_metrics_and_ids(door: FrontDoor) -> None:
    client = openai.OpenAI(base_url=f"{door.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert error(httpx.get(f"{door.url}/v1/models/huge"), 404)["code"] == "model_not_found"
    assert "sluice_ingress_requests_total" in httpx.get(f"{door.url}/metrics").text
    assert error(httpx.get(f"{door.url}/v1/nothing"), 404)["code"] == "unknown_url"
    echoed = httpx.get(f"{door.url}/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"]
    drawn = httpx.get(f"{door.url}/health", headers={"x-request-id": "no spaces!"}).headers["x-request-id"]
    assert echoed == "abc-1" and len(drawn) == 32


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "unrecognized request argument supplied: temprature; remove it"),
        ({"temperature": 2.5}, "temperature", "temperature: Input should be less than or equal to 2; got 2.5"),
        ({"top_p": 0}, "top_p", "top_p: Input should be greater than 0; got 0"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: Input should be greater than or equal to 1; got 0"),
        ({"max_tokens": "8"}, "max_tokens", 'max_tokens: Input should be a valid integer; got "8"'),
        ({"min_tokens": 9}, "min_tokens", "min_tokens: 9 is over max_tokens = 8"),
        ({"n": 2}, "n", "n: Input should be 1; got 2"),
        ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty: Input should be 0; got 0.5"),
        ({"stop": [""]}, "stop", "an empty stop string would end everything at once; remove it"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
        ({"prompt": []}, "prompt", "a text, or a list of token ids that is not empty"),
        ({"prompt": ["a", "b"]}, "prompt", "2 prompts in one request are not supported; send one request for each"),
        ({"prompt": [1, 400]}, "prompt", "token id 400 is outside the vocabulary of 400"),
        ({"prompt": ""}, "prompt", "it has no tokens; send some text"),
        ({"timeout_s": 61}, "timeout_s", "timeout_s: 61 is over the limit of 60 s"),
        ({"stream_options": {"include_usage": True}}, None, "stream_options needs stream: true"),
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


# ---------------------------------------------------------------- streams that end otherwise


def test_a_dead_worker_is_not_noticed_by_the_client(door: FrontDoor, worker: ScriptedWorker) -> None:
    worker.text, worker.script = None, [Say(3), Die()]
    other = ScriptedWorker("decode-1")
    other.load.num_running = 1
    try:
        door.connect(worker, other)
        streamed = events(complete(door, stream=True, return_token_ids=True, return_route=True))
        ids = [token for chunk in streamed for choice in chunk["choices"] for token in choice["token_ids"]]
        assert ids == all_tokens(PROMPT, 8)
        route = streamed[-1]["usage"]["sluice"]
        assert route["attempts"] == 2 and route["decode"]["name"] == "decode-1"
    finally:
        other.stop()


def test_a_failure_after_the_first_token_is_said_in_the_stream(door: FrontDoor, worker: ScriptedWorker) -> None:
    worker.script = [Say(2), Fail(pb.INTERNAL, "a bug")]
    before = door.outcomes("failed")
    *_, last = events(complete(door, stream=True))
    assert "a bug" in last["error"]["message"] and last["error"]["type"] == "server_error"
    assert door.outcomes("failed") == before + 1
    client = openai.OpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="a bug"):
        list(client.completions.create(model="tiny", prompt=PROMPT, stream=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", [0, 3])
def test_a_client_that_leaves_cancels(door: FrontDoor, worker: ScriptedWorker, stream: bool, said: int) -> None:
    """Before its first token and after it, waiting for a stream or for a whole answer."""
    worker.script = [Say(said), Wait()] if said else [Wait()]
    before = door.outcomes("cancelled")
    body = {"model": "tiny", "prompt": PROMPT, "stream": stream}
    with httpx.Client(timeout=0.3) as client, pytest.raises(httpx.ReadTimeout):
        client.post(f"{door.url}/v1/completions", json=body)
    worker.wait(lambda w: len(w.cancels) == 1)
    door.run(_until(door, lambda: door.outcomes("cancelled") == before + 1 and door.router.num_open == 0))


async def _until(door: FrontDoor, holds: Any) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.002)


def test_what_clients_see_is_measured(tokenizer: Tokenizer, worker: ScriptedWorker) -> None:
    with front_door(tokenizer) as door:
        door.connect(worker)
        complete(door)
        worker.script = [Say(2), Wait(), FOREVER]
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "stream": True}
        with httpx.stream("POST", f"{door.url}/v1/completions", json=body, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)  # the first tokens are out
            worker.go_on()
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        value = door.metrics.value
        assert door.outcomes("ok") == 2 and value("sluice_ingress_open_requests") == 0
        assert value("sluice_ingress_ttft_seconds_count") == value("sluice_ingress_end_to_end_seconds_count") == 2
        assert value("sluice_ingress_prompt_tokens_total") == 6
        generated = value("sluice_ingress_generated_tokens_total")
        assert generated == 16 and 6 <= value("sluice_ingress_inter_token_seconds_count") <= 14

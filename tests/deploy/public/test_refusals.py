"""Bad input at the public port: an error as OpenAI writes it, nothing lost, and the server goes on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.support.public_door import MODEL, PublicDoor

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
VOCABULARY = 4096
HI = [{"role": "user", "content": "hi"}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:,"}}
DEEP = "[" * 5000 + "]" * 5000
MIDDLE = "[" * 150 + "]" * 150

# Endpoint, what is sent beside the model, status, param, a part of the message.
BODIES: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (COMPLETIONS, {"prompt": "a", "temper": 1}, 400, "temper", "unrecognized request argument supplied: temper"),
    (COMPLETIONS, {}, 400, "prompt", "you must provide prompt"),
    (COMPLETIONS, {"prompt": "a", "model": "gpt-4"}, 404, "model", "'gpt-4' does not exist; use 'demo'"),
    (COMPLETIONS, {"prompt": "a", "model": 7}, 400, "model", "got 7"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "it has no tokens; send some text"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "not empty"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "prompt", "not empty"),
    (COMPLETIONS, {"prompt": ["a", ""]}, 400, "prompt", "it has no tokens"),
    (COMPLETIONS, {"prompt": ["a"] * 2049}, 400, "prompt", "2049 prompts are over the limit of 2048"),
    (COMPLETIONS, {"prompt": ["a", [5]]}, 400, "prompt", "or a list of either; send one of these"),
    (COMPLETIONS, {"prompt": [1.5]}, 400, "prompt", "a list of token ids"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", "a list of token ids"),
    (COMPLETIONS, {"prompt": [True]}, 400, "prompt", "a list of token ids"),
    (COMPLETIONS, {"prompt": {"text": "a"}}, 400, "prompt", "a list of token ids"),
    (COMPLETIONS, {"prompt": [10**400]}, 400, "prompt", "a list of token ids"),
    (COMPLETIONS, {"prompt": [1] * 2048}, 413, "prompt", "2048 tokens leave no room"),
    (COMPLETIONS, {"prompt": "word " * 9000}, 413, "prompt", "leave no room"),
    (COMPLETIONS, {"prompt": [1] * 2000, "max_tokens": 49}, 413, "max_tokens", "ask for at most 48"),
    (COMPLETIONS, {"prompt": "a", "temperature": -0.1}, 400, "temperature", "got -0.1"),
    (COMPLETIONS, {"prompt": "a", "temperature": 2.5}, 400, "temperature", "less than or equal to 2; got 2.5"),
    (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, 400, "temperature", 'got "hot"'),
    (COMPLETIONS, {"prompt": "a", "temperature": 10**400}, 400, "temperature", "temperature"),
    (COMPLETIONS, {"prompt": "a", "top_p": 0}, 400, "top_p", "top_p: Input should be greater than 0; got 0"),
    (COMPLETIONS, {"prompt": "a", "top_p": 1.1}, 400, "top_p", "got 1.1"),
    (COMPLETIONS, {"prompt": "a", "min_p": -0.5}, 400, "min_p", "got -0.5"),
    (COMPLETIONS, {"prompt": "a", "presence_penalty": -2.1}, 400, "presence_penalty", "got -2.1"),
    (COMPLETIONS, {"prompt": "a", "repetition_penalty": 5e-324}, 400, "repetition_penalty", "got 5e-324"),
    (COMPLETIONS, {"prompt": "a", "seed": 2**64}, 400, "seed", "less than 18446744073709551616"),
    (COMPLETIONS, {"prompt": "a", "seed": 10**400}, 400, "seed", "seed"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 2**31}, 400, "max_tokens", "less than 2147483648"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "got -1"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": "8"}, 400, "max_tokens", 'valid integer; got "8"'),
    (COMPLETIONS, {"prompt": "a", "max_tokens": True}, 400, "max_tokens", "got true"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, 400, "n", "got 0"),
    (COMPLETIONS, {"prompt": "a", "n": 33}, 400, "n", "n: 33 is over the limit of 32"),
    (COMPLETIONS, {"prompt": "a", "best_of": 33}, 400, "best_of", "best_of: 33 is over the limit of 32"),
    (COMPLETIONS, {"prompt": "a", "n": 3, "best_of": 2}, 400, None, "best_of: 2 is under n = 3"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2, "stream": True}, 400, None, "remove stream or best_of"),
    (COMPLETIONS, {"prompt": "a", "num_beams": 4, "stream": True}, 400, None, "remove stream or num_beams"),
    (COMPLETIONS, {"prompt": "a", "num_beams": 33}, 400, "num_beams", "num_beams: 33 is over the limit of 32"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, 400, "logprobs", "got 21"),
    (COMPLETIONS, {"prompt": "a", "logprobs": True}, 400, "logprobs", "got true"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "suffix", "not inserted before a suffix"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, None, "max_tokens: 0 needs echo"),
    (COMPLETIONS, {"prompt": "a", "stop": [""]}, 400, "stop", "an empty stop string"),
    (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 100_000}, 400, "stop", "at most 16 items"),
    (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 17}, 400, "stop", "at most 16 items"),
    (COMPLETIONS, {"prompt": "a", "stop": "x" * 1025}, 400, "stop", "over the limit of 1024"),
    (COMPLETIONS, {"prompt": "a", "stop": [7]}, 400, "stop", "got 7"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [1] * 65}, 400, "stop_token_ids", "at most 64"),
    (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, 400, None, "needs stream: true"),
    (COMPLETIONS, {"prompt": "a", "stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x", "unrecognized"),
    (
        COMPLETIONS,
        {"prompt": "a", "stream": True, "stream_options": {"continuous_usage_stats": True}},
        400,
        "stream_options",
        "continuous_usage_stats needs include_usage: true",
    ),
    (COMPLETIONS, {"prompt": "a", "timeout_s": 61}, 400, "timeout_s", "over the limit of 60 s"),
    (COMPLETIONS, {"prompt": "a", "min_tokens": 17}, 400, "min_tokens", "over max_tokens = 16"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "'x' is no token id"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"1": 101}}, 400, "logit_bias", "no number from -100 to 100"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": [1]}, 400, "logit_bias", "an object of at most"),
    (COMPLETIONS, {"prompt": "a", "bad_words": [""]}, 400, "bad_words", "not empty"),
    (COMPLETIONS, {"prompt": "a", "bad_words": ["a"] * 1025}, 400, "bad_words", "at most 1024"),
    # Token ids outside the vocabulary, wherever they may stand.
    (COMPLETIONS, {"prompt": [1, VOCABULARY]}, 400, "prompt", "token id 4096 is outside the vocabulary of 4096"),
    (COMPLETIONS, {"prompt": [[1], [VOCABULARY]]}, 400, "prompt", "token id 4096"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [VOCABULARY]}, 400, "stop_token_ids", "token id 4096"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"4096": 1}}, 400, "logit_bias", "token id 4096"),
    (COMPLETIONS, {"prompt": "a", "bad_words": [[VOCABULARY]]}, 400, "bad_words", "token id 4096"),
    (EMBEDDINGS, {"input": [VOCABULARY]}, 400, "input", "token id 4096"),
    ("/detokenize", {"tokens": [VOCABULARY]}, 400, "tokens", "token id 4096"),
    # Chat.
    (CHAT, {"messages": []}, 400, "messages", "at least 1 item"),
    (CHAT, {"messages": [{"role": "pirate", "content": "a"}]}, 400, "messages", 'got "pirate"'),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages", "you must provide content"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [PICTURE]}]},
        400,
        "messages",
        "type 'image_url' are not supported",
    ),
    (CHAT, {"messages": [{**HI[0], "tool_calls": [CALL]}]}, 400, "messages", "belong to messages of the assistant"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages", "tool_call_id goes with role tool"),
    (CHAT, {"messages": HI, "top_logprobs": 2}, 400, None, "top_logprobs needs logprobs: true"),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "got 21"),
    (CHAT, {"messages": HI, "echo": True}, 400, "echo", "unrecognized request argument"),
    (CHAT, {"messages": HI, "chat_template_kwargs": {"chat_template": "x"}}, 400, "chat_template_kwargs", "remove it"),
    (CHAT, {"messages": HI, "continue_final_message": True}, 400, None, "the last message is not the assistant's"),
    (CHAT, {"messages": HI, "tool_choice": "required"}, 400, None, "tool_choice needs tools"),
    (CHAT, {"messages": HI, "max_completion_tokens": 0}, 400, "max_completion_tokens", "got 0"),
    (EMBEDDINGS, {"input": "a", "dimensions": 95}, 400, "dimensions", "have 96, no other number"),
    (EMBEDDINGS, {"input": ""}, 400, "input", "it has no tokens"),
    (EMBEDDINGS, {"input": "a", "encoding_format": "hex"}, 400, "encoding_format", 'got "hex"'),
    ("/tokenize", {}, 400, None, "one of prompt and messages"),
    ("/detokenize", {"tokens": ["a"]}, 400, "tokens", 'got "a"'),
]

UNSUPPORTED = {
    "audio": {"voice": "x", "format": "wav"}, "functions": [], "function_call": "auto", "web_search_options": {},
    "modalities": ["audio"], "store": True, "verbosity": "low", "reasoning_effort": "high",
}  # fmt: skip

# Bodies that are no request: what is sent, its content type, status, a part of the message.
RAW: list[tuple[bytes, str | None, int, str]] = [
    (b"{", "application/json", 400, "the body is no JSON"),
    (b"", "application/json", 400, "the body is no JSON"),
    (b"[]", "application/json", 400, "the body is no JSON object"),
    (b"7", "application/json", 400, "the body is no JSON object"),
    (b"null", "application/json", 400, "JSON object"),
    (b'{"prompt": "\xff\xfe"}', "application/json", 400, "the body is no UTF-8 (byte 12)"),
    (b'{"prompt": "\\ud800"}', "application/json", 400, "half of a surrogate pair"),
    (b'{"temperature": NaN}', "application/json", 400, "NaN is no number of JSON"),
    (b'{"temperature": -Infinity}', "application/json", 400, "-Infinity is no number of JSON"),
    (b'{"model": "demo", "prompt": "a", "temperature": 1e999}', "application/json", 400, "temperature"),
    (b'{"model": "demo", "prompt": "a", "logit_bias": {"1": 1e999}}', "application/json", 400, "logit_bias"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", 400, "the body is no JSON"),
    (b'{"prompt": ' + DEEP.encode() + b"}", "application/json", 400, "nested deeper than 100 levels"),
    (b'{"prompt": ' + MIDDLE.encode() + b"}", "application/json", 400, "nested deeper than 100 levels"),
    (b'{"prompt": "a"}', "text/plain", 415, "the body is 'text/plain'; send JSON"),
    (b"prompt=a", "application/x-www-form-urlencoded", 415, "send JSON"),
    (b"--x--", "multipart/form-data; boundary=x", 415, "send JSON"),
]


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer that is one, as OpenAI writes it."""
    assert answer.status_code == status, answer.text[:500]
    assert len(answer.headers.get_list("x-request-id")) == 1
    (error,) = answer.json().values()
    assert error.keys() == {"message", "type", "param", "code"} and len(answer.text) < 1000
    return error


def test_bad_bodies(door: PublicDoor) -> None:
    for path, body, status, param, message in BODIES:
        error = refusal(door.post(path, **body), status)
        assert message in error["message"] and error["param"] == param, (body, error)
        assert error["type"] == "invalid_request_error"
    assert door.complete(prompt="a", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_what_openai_documents_and_cannot_be_done_is_named(door: PublicDoor) -> None:
    for param, value in UNSUPPORTED.items():
        error = refusal(door.post(CHAT, messages=HI, **{param: value}), 400)
        assert (error["param"], error["code"]) == (param, "unsupported_parameter"), error


def test_what_changes_nothing_is_taken(door: PublicDoor) -> None:
    neutral = {
        "n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "user": "me", "stop": None,
        "seed": None, "temperature": 0, "max_tokens": 2, "ignore_eos": True,
    }  # fmt: skip
    completion = {"echo": False, "best_of": 1, "suffix": "", "logprobs": None}
    chat = {
        "logprobs": False, "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "modalities": ["text"],
        "verbosity": "medium", "reasoning_effort": "none", "prediction": {"type": "content", "content": "a"},
        "prompt_cache_key": "k", "safety_identifier": "s", "parallel_tool_calls": True, "response_format": None,
    }  # fmt: skip
    plain = door.complete(prompt="a", max_tokens=2)["choices"]
    assert door.post(COMPLETIONS, prompt="a", **neutral, **completion).json()["choices"] == plain
    assert door.post(COMPLETIONS, prompt=["a"], **neutral).json()["choices"] == plain
    plain = door.chat("hi", max_tokens=2)["choices"]
    assert door.post(CHAT, messages=HI, **neutral, **chat).json()["choices"] == plain


def test_bodies_that_are_no_request(door: PublicDoor) -> None:
    for content, content_type, status, message in RAW:
        headers = {"content-type": content_type} if content_type else {}
        error = refusal(door.client.post(COMPLETIONS, content=content, headers=headers), status)
        assert message in error["message"], (content[:80], error)
    untyped = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1}).encode()
    assert door.client.post(COMPLETIONS, content=untyped).status_code == 200


def test_null_bytes_are_text(door: PublicDoor) -> None:
    answer = door.complete(prompt="a\0b", max_tokens=2, echo=True, stop="\0\0")
    assert answer["choices"][0]["text"].startswith("a\0b")


def test_a_body_of_50_megabytes(door: PublicDoor) -> None:
    """Announced or not; the connection may end while it is still being sent."""
    body = json.dumps({"model": MODEL, "prompt": "x" * (50 << 20)}).encode()
    for content in (body, iter([body[: 20 << 20], body[20 << 20 :]])):
        try:
            answer = door.client.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
        except httpx.TransportError:
            continue
        assert refusal(answer, 413)["code"] == "body_too_large"
    assert door.complete(prompt="a", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_a_chat_template_that_fails(door: PublicDoor) -> None:
    tool = {"role": "tool", "content": "42", "tool_call_id": "c"}
    said = {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1]"}}]}
    for messages in ([*HI, tool], [*HI, said]):
        error = refusal(door.post(CHAT, messages=messages), 400)
        assert "chat template refuses these messages" in error["message"] and error["param"] == "messages"


def test_wrong_paths_and_methods(door: PublicDoor) -> None:
    for method, path, status, code in (
        ("GET", COMPLETIONS, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("PUT", CHAT, 405, "method_not_allowed"),
        ("POST", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1/models/huge", 404, "model_not_found"),
        ("GET", "/v1/models/%ff%00", 404, "model_not_found"),
    ):
        error = refusal(door.client.request(method, path), status)
        assert error["code"] == code, error

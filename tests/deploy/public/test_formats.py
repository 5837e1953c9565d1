"""Answers in a form: JSON, schemas and calls of tools, through the public port."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.public_door import PublicDoor

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

CHAT = "/v1/chat/completions"
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "greet", "description": "says hello", "parameters": PERSON}}
OTHER = {"type": "function", "function": {"name": "leave", "parameters": {}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
FREE = {"ignore_eos": False, "max_tokens": 200}


def check(person: dict[str, Any]) -> None:
    assert person.keys() == {"name", "age"} and person["name"] in ("ann", "bob") and 0 <= person["age"] <= 99


def test_a_schema_is_kept_streamed_and_whole_by_every_sample(door: PublicDoor) -> None:
    body = {"response_format": FORMAT, "n": 3, "temperature": 1.0, "seed": 4, **FREE}
    choices = door.chat("who?", **body)["choices"]
    for choice in choices:
        assert choice["finish_reason"] == "stop"
        check(json.loads(choice["message"]["content"]))
    streamed = ["", "", ""]
    for chunk in door.stream(CHAT, messages=[{"role": "user", "content": "who?"}], **body):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == [choice["message"]["content"] for choice in choices]


def test_a_tool_that_must_be_called_is(door: PublicDoor) -> None:
    body = {"tools": [TOOL, OTHER], "tool_choice": {"type": "function", "function": {"name": "greet"}}, **FREE}
    (choice,) = door.chat("greet ann", **body)["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "greet" and call["id"].startswith("call_")
    check(json.loads(call["function"]["arguments"]))
    name, arguments, finish = "", "", None
    for chunk in door.stream(CHAT, messages=[{"role": "user", "content": "greet ann"}], **body):
        (part,) = chunk["choices"]
        assert not part["delta"].get("content")
        for delta in part["delta"].get("tool_calls", ()):
            name += delta["function"].get("name", "")
            arguments += delta["function"].get("arguments", "")
        finish = part["finish_reason"] or finish
    assert (name, arguments, finish) == ("greet", call["function"]["arguments"], "tool_calls")


def test_without_tools_there_are_no_calls(door: PublicDoor) -> None:
    plain = door.chat("hi", max_tokens=8)["choices"]
    assert door.chat("hi", max_tokens=8, tools=[TOOL], tool_choice="none")["choices"] == plain
    assert door.chat("hi", max_tokens=8, response_format={"type": "text"})["choices"] == plain


def test_forms_that_cannot_be_are_refused(door: PublicDoor) -> None:
    wide = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(5000)}}
    named = {"name": "x"}
    for options, param in (
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {**named, "schema": wide}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}, "response_format"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
    ):  # fmt: skip
        answer = door.post(CHAT, messages=[{"role": "user", "content": "hi"}], **options)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert (error["param"] or "").startswith(param) and len(error["message"]) < 600, error
    assert door.chat("hi", max_tokens=1)["usage"]["completion_tokens"] == 1


def deltas(door: PublicDoor, **body: Any) -> tuple[str, list[tuple[str, str]], str | None]:
    """Of a stream with one choice: the content, the calls by name and arguments, and how it ended."""
    content, calls, finish = "", list[tuple[str, str]](), None
    for chunk in door.stream(CHAT, **body):
        for choice in chunk["choices"]:
            content += choice["delta"].get("content") or ""
            finish = choice["finish_reason"] or finish
            for part in choice["delta"].get("tool_calls", ()):
                if "name" in part["function"]:
                    assert part["index"] == len(calls) and part["id"].startswith("call_")
                    calls.append((part["function"]["name"], ""))
                name, arguments = calls[part["index"]]
                calls[part["index"]] = (name, arguments + part["function"].get("arguments", ""))
    return content, calls, finish


def whole(door: PublicDoor, **body: Any) -> tuple[str, list[tuple[str, str]], str | None]:
    """As `deltas`, not streamed."""
    (choice,) = door.chat("", **body)["choices"]
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in choice["message"].get("tool_calls") or ()]
    return choice["message"]["content"] or "", calls, choice["finish_reason"]


def test_what_may_be_called_is_called_or_not(door: PublicDoor) -> None:
    """Beside a schema that leaves one other answer, a bias decides whether the model calls."""
    five = door.ids("5")[0]
    asked = {"messages": [{"role": "user", "content": "greet ann"}], "temperature": 1.0, "seed": 3, **FREE}
    asked["parallel_tool_calls"] = False  # the model likes calls: it would go on and on
    five_only = {"type": "json_schema", "json_schema": {"name": "five", "schema": {"const": 5}}}
    either = {**asked, "tools": [TOOL, OTHER], "tool_choice": "auto", "response_format": five_only}
    for body in ({**either, "logit_bias": {five: -100}}, {**asked, "tools": [TOOL, OTHER], "tool_choice": "required"}):
        content, calls, finish = deltas(door, **body)
        assert content.strip() == "" and calls and finish == "tool_calls"
        for name, arguments in calls:
            if name == "greet":
                check(json.loads(arguments))
            else:
                assert (name, json.loads(arguments)) == ("leave", {})
        assert whole(door, **body) == ("", calls, "tool_calls")
    for body in ({**either, "logit_bias": {five: 100}}, {**either, "tool_choice": "none"}):
        assert deltas(door, **body) == whole(door, **body) == ("5", [], "stop")
    text, calls, finish = deltas(door, **{**asked, "tools": [TOOL], "max_tokens": 8, "ignore_eos": True})
    assert text and not calls and finish == "length"


def test_calls_side_by_side_unless_one_is_asked_for(door: PublicDoor) -> None:
    body = {"tools": [OTHER], "tool_choice": "required", "temperature": 1.0, "seed": 1, "n": 4, **FREE}
    for more, is_right in (({}, lambda most: most > 1), ({"parallel_tool_calls": False}, lambda most: most == 1)):
        choices = door.chat("bye", **body, **more)["choices"]
        calls = [choice["message"]["tool_calls"] for choice in choices]
        assert {call["function"]["name"] for each in calls for call in each} == {"leave"}
        assert is_right(max(map(len, calls))), calls
        ids = [call["id"] for each in calls for call in each]
        assert len(set(ids)) == len(ids)


def test_a_call_and_what_came_of_it_go_into_the_next_turn(door: PublicDoor) -> None:
    asked = {"role": "user", "content": "greet bob"}
    (choice,) = door.chat("greet bob", tools=[TOOL], tool_choice="required", parallel_tool_calls=False, **FREE)[
        "choices"
    ]
    (call,) = choice["message"]["tool_calls"]
    answer = {"role": "tool", "tool_call_id": call["id"], "content": "he says hi"}
    turn = {"messages": [asked, choice["message"], answer], "tools": [TOOL]}
    tokens = door.post("/tokenize", **turn).json()["tokens"]
    text = door.post("/detokenize", tokens=tokens).json()["prompt"]
    arguments = json.loads(call["function"]["arguments"])
    written = text.partition('<tool_call>\n{"name": "greet", "arguments": ')[2].partition("}\n</tool_call>")[0]
    assert json.loads(written) == arguments
    assert text.endswith("<|user|><tool_response>he says hi</tool_response><|end|><|assistant|>")
    first = door.chat("", **turn, max_tokens=6)
    assert first["usage"]["prompt_tokens"] == len(tokens)
    content, calls, finish = deltas(door, **turn, max_tokens=6)
    assert (content, calls, finish) == (first["choices"][0]["message"]["content"], [], "length")


def test_special_tokens_are_never_the_text_of_an_answer(door: PublicDoor) -> None:
    """What is spelled like one is said in other tokens, and ends nothing."""
    special = {token for name in ("end", "system", "user", "assistant") for token in door.ids(f"<|{name}|>")}
    assert len(special) == 4
    schema = {
        "type": "array",
        "prefixItems": [{"const": "<|end|>"}, {"const": "<|user|>"}],
        "minItems": 2,
        "items": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    bias = dict.fromkeys(special, 100)
    (choice,) = door.chat("hi", response_format=wanted, return_token_ids=True, logit_bias=bias, **FREE)["choices"]
    assert json.loads(choice["message"]["content"]) == ["<|end|>", "<|user|>"] and choice["finish_reason"] == "stop"
    assert special.intersection(choice["token_ids"]) <= set(door.ids("<|end|>"))
    assert special.isdisjoint(choice["token_ids"][:-1])


_EXPLODING: tuple[dict[str, object], ...] = (
    {"type": "integer", "multipleOf": 99999989, "minimum": 7},
    {"properties": {f"k{n:x}": {} for n in range(4000)}},
    {"properties": {f"k{n:x}": {"type": "object", "properties": {"a": {"type": "integer"}}} for n in range(300)}},
    {"allOf": [{"type": "string", "pattern": f"^.*{k}.*[a-z]{{1,50}}$"} for k in range(12)]},
    {"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {}}} for j in range(6)]} for i in range(8)]},
)


def test_exploding_schemas_are_refused_beside_a_stream(door: PublicDoor) -> None:
    body = {"messages": [{"role": "user", "content": "tell me"}], "max_tokens": 100}
    alone = deltas(door, **body)

    def explode(nth: int) -> httpx.Response:
        schema = {**_EXPLODING[nth % len(_EXPLODING)], "title": f"number {nth}"}  # none is known yet
        messages = [{"role": "user", "content": "hi"}]
        if nth % 2:
            tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", **schema}}}
            return door.post(CHAT, messages=messages, tools=[tool], max_tokens=1)
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return door.post(CHAT, messages=messages, response_format=wanted, max_tokens=1)

    with ThreadPoolExecutor(11) as clients:
        stream = clients.submit(deltas, door, **body)
        refusals = list(clients.map(explode, range(20)))
        assert stream.result() == alone
    for nth, answer in enumerate(refusals):
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == ("tools" if nth % 2 else "response_format"), error
        assert len(error["message"]) < 600 and error["type"] == "invalid_request_error", error

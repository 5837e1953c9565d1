"""Answers in a form: JSON, schemas and calls of tools, through the public port."""

from __future__ import annotations

import json
from typing import Any

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

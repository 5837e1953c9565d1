"""Calls of tools in text: what the grammar allows, the parser reads, however the text is cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.tool_calls import CallArguments, CallBegun, Content, ToolCallParser
from deploy.tool_format import (
    DEEPSEEK,
    DEEPSEEK_FENCED,
    FORMATS,
    HERMES,
    LIST,
    LLAMA3,
    ToolFormat,
    tool_format_of,
)
from tests.support.written_calls import Call, written

CALLS: list[Call] = [
    ("look_up", '{"city": "Paris }]\\" </tool_call>", "n": [1, {"a": {}}]}'),
    ("add", "{}"),
    ("add", '{"é": "😀"}'),
]


def read(tool_format: ToolFormat, pieces: Sequence[str]) -> tuple[str, list[Call], list[str]]:
    """(content, calls, ids)."""
    ids = itertools.count()
    parser = ToolCallParser(tool_format, lambda: f"call_{next(ids)}")
    content, calls, seen = "", list[Call](), list[str]()
    for event in [*itertools.chain.from_iterable(parser.push(piece) for piece in pieces), *parser.flush()]:
        match event:
            case Content(text):
                content += text
            case CallBegun(call, id_, name):
                assert call == len(calls)
                calls.append((name, ""))
                seen.append(id_)
            case CallArguments(call, text):
                assert call == len(calls) - 1 and text
                calls[call] = (calls[call][0], calls[call][1] + text)
    assert parser.num_calls == len(calls)
    return content, calls, seen


def cut(text: str, places: Sequence[int]) -> list[str]:
    at = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(at)]


@settings(deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.sampled_from(CALLS), min_size=1, max_size=3),
    st.sampled_from(["", "I look. ", "a <tool_", "a <｜tool▁calls"]),
    st.sampled_from(["", "\n", " "]),
    st.lists(st.integers(0, 10_000), max_size=30),
)
def test_any_cut_of_the_text_gives_the_same_calls(
    tool_format: ToolFormat, calls: list[Call], before: str, space: str, places: list[int]
) -> None:
    calls = calls[: tool_format.max_calls]
    before = before if tool_format.is_anywhere else ""
    text = before + written(tool_format, calls, space)
    assert read(tool_format, cut(text, places)) == (before, calls, [f"call_{nth}" for nth in range(len(calls))])
    assert read(tool_format, list(text))[:2] == (before, calls)


@settings(deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(["", "plain", "[1, 2]", '{"a": 1}', "a < b", "<tool", '[{"nam', "<｜tool", "{", "\n\n"]),
    st.lists(st.integers(0, 100), max_size=5),
)
def test_text_without_a_call_is_content(tool_format: ToolFormat, text: str, places: list[int]) -> None:
    assert read(tool_format, cut(text, places)) == (text, [], [])


@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda each: each.name)
def test_no_part_of_a_marker_is_ever_content(tool_format: ToolFormat) -> None:
    """At every moment, not only at the end: what was shown cannot be taken back."""
    before = "Hello " if tool_format.is_anywhere else ""
    text = before + written(tool_format, CALLS[:1])
    parser = ToolCallParser(tool_format, lambda: "id")
    shown = ""
    for letter in text:
        shown += "".join(event.text for event in parser.push(letter) if isinstance(event, Content))
        assert before.startswith(shown)
    assert shown == before


@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda each: each.name)
def test_a_call_cut_short_keeps_what_came(tool_format: ToolFormat) -> None:
    text = written(tool_format, CALLS[:1])
    for length in range(len(tool_format.trigger), len(text)):
        content, calls, _ = read(tool_format, [text[:length]])
        assert content == ""
        assert all(name == CALLS[0][0] and CALLS[0][1].startswith(arguments) for name, arguments in calls)


def test_what_only_looks_like_a_call_is_content() -> None:
    text = 'see <tool_call> for {"name": 3}'
    assert read(HERMES, list(text)) == (text, [], [])
    call = written(HERMES, CALLS[1:2])
    assert read(HERMES, [call + " and text"])[:2] == (" and text", CALLS[1:2])
    assert read(LIST, ['[{"name": "' + "x" * 200])[:2] == ('[{"name": "' + "x" * 200, [])


@pytest.mark.parametrize(
    ("template", "tool_format"),
    [
        (None, LIST),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", LIST),
        ('{{ "<tool_call>\\n{"name": " }}{{ call.name }}", "arguments": ', HERMES),
        ("""{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}""", LLAMA3),
        ("{{'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + name + '\\n' + '```json'}}", DEEPSEEK_FENCED),
        ("{{'<｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>'}}", DEEPSEEK),
    ],
)
def test_the_format_is_read_off_the_chat_template(template: str | None, tool_format: ToolFormat) -> None:
    assert tool_format_of(template) is tool_format

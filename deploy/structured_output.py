"""From response_format, tools and tool_choice to the grammar of the answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from cluster.errors import InvalidRequest
from cluster.request import Grammar, GrammarKind
from deploy.openai_requests import ChatRequest, Function, NamedTool, ResponseFormat, Tool
from deploy.tool_format import CallableTool, ToolFormat, lark_of
from workers.engine.constraint import ConstraintCompiler
from workers.engine.grammar import JSON_WHITESPACE


def grammar_of(body: ChatRequest, tool_format: ToolFormat, compiler: ConstraintCompiler) -> Grammar | None:
    """None: any text. Checked as the workers will check it, in up to a second: not on an event loop.

    Raises InvalidRequest naming the parameter. With `tool_choice` auto the answer is text, or what `response_format`
    says, or calls; a call that is begun is valid to its end.
    """
    text_schema = _text_schema(body.response_format)
    if text_schema is not None:
        _check(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(text_schema)), "response_format", compiler)
    tools = _chosen(body.tools, body.tool_choice)
    if not tools:
        return None if text_schema is None else Grammar(GrammarKind.JSON_SCHEMA, json.dumps(text_schema))
    callables = [_callable(tool.function, compiler) for tool in tools]
    must_call = body.tool_choice not in (None, "auto")
    if text_schema is not None and not must_call and not tool_format.is_anywhere:
        raise InvalidRequest(
            "response_format: this model writes calls as JSON, which could not be told from the answer; remove it, or "
            "set tool_choice to none or required",
            "response_format",
        )
    one_call = not body.parallel_tool_calls or isinstance(body.tool_choice, NamedTool)
    lark = lark_of(
        tool_format,
        callables,
        must_call=must_call,
        max_calls=1 if one_call else None,
        text_schema=None if text_schema is None else _spaced(text_schema),
    )
    grammar = Grammar(GrammarKind.LARK, lark)
    _check(grammar, "tools", compiler)
    return grammar


def wants_form(body: ChatRequest) -> bool:
    """Whether there is anything for `grammar_of` to look at."""
    return bool(body.tools) or (body.response_format is not None and body.response_format.type != "text")


def may_call(body: ChatRequest) -> bool:
    """Whether the answer is to be read for calls, and the tools are to be shown to the model."""
    return bool(body.tools) and body.tool_choice != "none"


def _text_schema(wanted: ResponseFormat | None) -> dict[str, object] | None:
    """None: any text."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return {"type": "object"}
    return _plain(wanted.json_schema.schema_, "response_format")


def _chosen(tools: Sequence[Tool], choice: str | NamedTool | None) -> list[Tool]:
    """Those that may be called."""
    names = Counter(tool.function.name for tool in tools)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InvalidRequest(f"tools: {twice[0]!r} is defined {names[twice[0]]} times; rename all but one", "tools")
    if choice == "none":
        return []
    if not isinstance(choice, NamedTool):
        return list(tools)
    name = choice.function.name
    if name not in names:
        raise InvalidRequest(f"tool_choice: there is no tool {name[:64]!r}; name one of tools", "tool_choice")
    return [tool for tool in tools if tool.function.name == name]


def _callable(function: Function, compiler: ConstraintCompiler) -> CallableTool:
    schema = _plain(function.parameters, "tools") or {"properties": {}, "additionalProperties": False}
    kind = schema.setdefault("type", "object")
    if kind != "object":
        raise InvalidRequest(
            f"tools: the parameters of {function.name} are of type {str(kind)[:40]!r}; make them an object", "tools"
        )
    _check(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)), "tools", compiler, f" of {function.name}")
    return CallableTool(function.name, _spaced(schema))


def _plain(schema: dict[str, object], param: str) -> dict[str, object]:
    """A copy of its own. Options of the parser are ours to set."""
    if "x-guidance" in schema:
        raise InvalidRequest(f"{param}: x-guidance is no keyword of JSON Schema; remove it", param)
    return dict(schema)


def _spaced(schema: dict[str, object]) -> dict[str, object]:
    """As GrammarKind.JSON_SCHEMA reads it, for a place inside another grammar."""
    return {**schema, "x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}


def _check(grammar: Grammar, param: str, compiler: ConstraintCompiler, whose: str = "") -> None:
    try:
        compiler.check(grammar)
    except InvalidRequest as error:
        raise InvalidRequest(f"{param}{whose}: {error}", param) from None

"""From response_format and tools to grammars, over a real vocabulary: what they refuse, and what is drawn from them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken

from cluster.errors import InvalidRequest
from cluster.request import Grammar, GrammarKind
from deploy.openai_requests import ChatRequest
from deploy.structured_output import grammar_of, may_call
from deploy.tool_calls import CallArguments, CallBegun, Content, ToolCallParser
from deploy.tool_format import FORMATS, LIST, LLAMA3, ToolFormat
from tests.support.tokenizer_files import write_tokenizer
from tests.support.written_calls import written
from workers.engine.grammar import GrammarCompiler

VOCAB_SIZE = 400
EOS = 0
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ADD = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
SCHEMAS = {"weather": WEATHER, "weather_2": ADD}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": tree}} for name, tree in SCHEMAS.items()]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def compiler(backend: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    path: Path = tmp_path_factory.mktemp("copy") / "tokenizer.json"
    backend.save(str(path))
    return GrammarCompiler(path, VOCAB_SIZE, frozenset({EOS}))


def chat(**fields: object) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields})


def draw(compiler: GrammarCompiler, backend: tokenizers.Tokenizer, grammar: Grammar, begun: str, seed: int) -> str:
    """A whole answer that begins with `begun`."""
    state, dice = compiler.compile(grammar), random.Random(seed)
    tokens = backend.encode(begun).ids
    mask = np.zeros((VOCAB_SIZE + 31) // 32, dtype=np.uint32)

    def allowed() -> list[int]:
        state.fill(mask)
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()

    for token in tokens:
        assert token in allowed(), f"{begun!r} is no beginning"
        state.advance([token])
    for _ in range(4_000):
        choices = allowed()
        if choices == [EOS] or (EOS in choices and dice.random() < 0.5):
            return backend.decode(tokens, skip_special_tokens=False)
        tokens.append(dice.choice([token for token in choices if token != EOS]))
        state.advance(tokens[-1:])
    raise AssertionError(f"no end: {backend.decode(tokens)!r}")


def calls_of(tool_format: ToolFormat, text: str) -> list[tuple[str, object]]:
    """Every call of the text, which has no content."""
    parser = ToolCallParser(tool_format, lambda: "id")
    names, arguments = list[str](), list[str]()
    for event in [*parser.push(text), *parser.flush()]:
        match event:
            case CallBegun(_, _, name):
                names.append(name)
                arguments.append("")
            case CallArguments(call, piece):
                arguments[call] += piece
            case Content(piece):
                assert piece.strip() == "", text
    return [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]


def check_calls(calls: list[tuple[str, object]]) -> None:
    for name, arguments in calls:
        jsonschema.validate(arguments, SCHEMAS[name])


def test_free_text_has_no_grammar(compiler: GrammarCompiler) -> None:
    for fields in ({}, {"response_format": {"type": "text"}}, {"tools": TOOLS, "tool_choice": "none"}):
        assert grammar_of(chat(**fields), LIST, compiler) is None
        assert not may_call(chat(**fields))


def test_response_formats(compiler: GrammarCompiler, backend: tokenizers.Tokenizer) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "w", "strict": True, "schema": WEATHER}}
    grammar = grammar_of(chat(response_format=wanted), LIST, compiler)
    assert grammar is not None and grammar == Grammar(GrammarKind.JSON_SCHEMA, json.dumps(WEATHER))
    for seed in range(5):
        jsonschema.validate(json.loads(draw(compiler, backend, grammar, "", seed)), WEATHER)
    grammar = grammar_of(chat(response_format={"type": "json_object"}), LIST, compiler)
    assert grammar == Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')


@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda each: each.name)
def test_required_calls_are_valid(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer, tool_format: ToolFormat
) -> None:
    grammar = grammar_of(chat(tools=TOOLS, tool_choice="required"), tool_format, compiler)
    assert grammar is not None
    drawn = [calls_of(tool_format, draw(compiler, backend, grammar, "", seed)) for seed in range(12)]
    for calls in drawn:
        assert calls
        check_calls(calls)
    assert {name for calls in drawn for name, _ in calls} == set(SCHEMAS)
    if tool_format.max_calls is None:
        assert max(len(calls) for calls in drawn) > 1
    for fields in (
        {"tool_choice": "required", "parallel_tool_calls": False},
        {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
    ):
        grammar = grammar_of(chat(tools=TOOLS, **fields), tool_format, compiler)
        assert grammar is not None
        for seed in range(8):
            calls = calls_of(tool_format, draw(compiler, backend, grammar, "", seed))
            assert len(calls) == 1
            check_calls(calls)
            assert calls[0][0] == "weather" or fields["tool_choice"] == "required"


@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda each: each.name)
def test_auto_is_text_until_a_call_begins(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer, tool_format: ToolFormat
) -> None:
    grammar = grammar_of(chat(tools=TOOLS), tool_format, compiler)
    assert grammar is not None
    for text in ("", "Hello, you.\n", "[1, 2]", '{"a": "b"}', "a < b"):
        state = compiler.compile(grammar)
        mask = np.zeros((VOCAB_SIZE + 31) // 32, dtype=np.uint32)
        state.advance(backend.encode(text).ids)
        state.fill(mask)
        assert mask[0] & 1, f"{text!r} may end"
    for before in ("", "I look. ") if tool_format.is_anywhere else ("",):
        for seed in range(8):
            text = draw(compiler, backend, grammar, before + tool_format.trigger, seed)
            calls = calls_of(tool_format, text.removeprefix(before))
            assert calls, text
            check_calls(calls)


def test_auto_beside_a_schema(compiler: GrammarCompiler, backend: tokenizers.Tokenizer) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER}}
    body = chat(tools=TOOLS, response_format=wanted)
    for tool_format in (each for each in FORMATS if each.is_anywhere):
        grammar = grammar_of(body, tool_format, compiler)
        assert grammar is not None
        jsonschema.validate(json.loads(draw(compiler, backend, grammar, '{"city', 0)), WEATHER)
        check_calls(calls_of(tool_format, draw(compiler, backend, grammar, tool_format.trigger, 0)))
    with pytest.raises(InvalidRequest, match="could not be told from the answer"):
        grammar_of(body, LLAMA3, compiler)


def tool(name: str = "f", /, **parameters: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tools": [tool(), tool()]}, "tools", "'f' is defined 2 times"),
        (
            {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "no tool 'g'",
        ),
        ({"tools": [tool(type="array")]}, "tools", "make them an object"),
        ({"tools": [tool(type="object", properties={"a": {"not": {}}})]}, "tools", "tools of f.*not"),
        ({"tools": [tool("f", **{"x-guidance": {"lenient": True}})]}, "tools", "x-guidance"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "w", "schema": {"type": "array", "uniqueItems": True}},
                }
            },
            "response_format",
            "uniqueItems",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "w", "schema": {"properties": {f"k{n}": {} for n in range(4000)}}},
                }
            },
            "response_format",
            "too big",
        ),
    ],
)
def test_refused(compiler: GrammarCompiler, fields: dict[str, object], param: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refusal:
        grammar_of(chat(**fields), LIST, compiler)
    assert refusal.value.param == param


MARKS = (
    "<tool_call>", "</tool_call>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
)  # fmt: skip


@pytest.mark.parametrize("special", [False, True])
def test_marks_that_are_tokens_are_said_in_them(backend: tokenizers.Tokenizer, tmp_path: Path, special: bool) -> None:
    """As in the vocabularies of Qwen and DeepSeek. Within arguments they are no text."""
    rich = tokenizers.Tokenizer.from_str(backend.to_str())
    rich.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in MARKS])
    rich.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    rich.save(str(tmp_path / "tokenizer.json"))
    added = rich.get_added_tokens_decoder()
    marks, think = {rich.token_to_id(mark) for mark in MARKS}, rich.token_to_id("<think>")
    compiler = GrammarCompiler(tmp_path / "tokenizer.json", VOCAB_SIZE, frozenset({EOS}))
    for plain in FORMATS:
        tool_format = plain.over(added)
        for choice in ("required", "auto"):
            grammar = grammar_of(chat(tools=TOOLS, tool_choice=choice), tool_format, compiler)
            assert grammar is not None
            before = ["", "I look. ", "<think>hm. "] if choice == "auto" and tool_format.is_anywhere else [""]
            for begun in before:
                text = draw(compiler, rich, grammar, begun + tool_format.trigger, 0)
                calls = calls_of(tool_format, text.removeprefix(begun))
                assert calls, text
                check_calls(calls)
            if choice == "auto":
                draw(compiler, rich, grammar, "<think>hm", 0)
        noted = chat(
            tools=[tool("note", properties={"text": {"type": "string"}}, required=["text"])], tool_choice="required"
        )
        grammar = grammar_of(noted, tool_format, compiler)
        assert grammar is not None
        state, mask = compiler.compile(grammar), np.zeros((VOCAB_SIZE + 31) // 32, dtype=np.uint32)
        arguments = written(tool_format, [("note", '{"text": "a')], " ").partition('": "a')[0] + '": "a'
        state.advance(rich.encode(arguments).ids)
        state.fill(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        assert len(allowed) > 100 and not (marks | {think, EOS}).intersection(allowed)


def test_no_parameters_are_no_arguments(compiler: GrammarCompiler, backend: tokenizers.Tokenizer) -> None:
    grammar = grammar_of(chat(tools=[tool("now")], tool_choice="required"), LLAMA3, compiler)
    assert grammar is not None
    assert calls_of(LLAMA3, draw(compiler, backend, grammar, "", 0)) == [("now", {})]

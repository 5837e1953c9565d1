"""How a model writes its calls of tools, read off its chat template: one description for the grammar and the parser."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers import AddedToken


class Slot(Enum):
    NAME = "name"
    ARGUMENTS = "arguments"  # a JSON object
    SPACE = "space"  # optional white space


Element = str | Slot  # a str stands for itself


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """`opening` call (`separator` call)* `closing`. What begins it all is told from text by `trigger`."""

    name: str
    opening: str = ""
    call: tuple[Element, ...]
    separator: tuple[Element, ...] = ()
    closing: str = ""
    max_calls: int | None = None
    is_anywhere: bool  # text may come before the calls; else the answer begins with them or has none
    tokens: tuple[tuple[str, int], ...] = ()  # pieces of what stands for itself that are one token: nothing spells it
    text_tokens: tuple[int, ...] = ()  # others that nothing spells and that free text may hold, as <think>

    def over(self, added: Mapping[int, AddedToken]) -> ToolFormat:
        """The same for one vocabulary, of whose added tokens these are by id."""
        marks = "".join(each for each in (self.opening, *self.call, self.closing) if isinstance(each, str))
        tokens = tuple((token.content, number) for number, token in added.items() if token.content in marks)
        own = {number for _, number in tokens}
        others = (number for number, token in added.items() if not token.special and number not in own)
        return replace(self, tokens=tokens, text_tokens=tuple(others))

    @property
    def trigger(self) -> str:
        first = self.call[0]
        assert isinstance(first, str)
        return self.opening if self.is_anywhere and self.opening else self.opening + first


class CallableTool(NamedTuple):
    name: str
    schema: dict[str, object]  # of its arguments


_OBJECT: tuple[Element, ...] = ('{"name": "', Slot.NAME, '", "arguments": ', Slot.ARGUMENTS, "}")
HERMES = ToolFormat(
    name="hermes",
    call=("<tool_call>", Slot.SPACE, *_OBJECT, Slot.SPACE, "</tool_call>"),
    separator=(Slot.SPACE,),
    is_anywhere=True,
)
LLAMA3 = ToolFormat(
    name="llama3",
    call=('{"name": "', Slot.NAME, '", "parameters": ', Slot.ARGUMENTS, "}"),
    max_calls=1,
    is_anywhere=False,
)
_DEEPSEEK_BEGIN, _DEEPSEEK_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL_BEGIN, _CALL_SEPARATOR, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
DEEPSEEK_FENCED = ToolFormat(  # V3, R1
    name="deepseek-fenced",
    opening=_DEEPSEEK_BEGIN,
    call=(
        f"{_CALL_BEGIN}function{_CALL_SEPARATOR}",
        Slot.NAME,
        "\n```json\n",
        Slot.ARGUMENTS,
        f"\n```{_CALL_END}",
    ),
    separator=(Slot.SPACE,),
    closing=_DEEPSEEK_END,
    is_anywhere=True,
)
DEEPSEEK = ToolFormat(  # V3.1
    name="deepseek",
    opening=_DEEPSEEK_BEGIN,
    call=(_CALL_BEGIN, Slot.NAME, _CALL_SEPARATOR, Slot.ARGUMENTS, _CALL_END),
    closing=_DEEPSEEK_END,
    is_anywhere=True,
)
LIST = ToolFormat(name="list", opening="[", call=_OBJECT, separator=(",", Slot.SPACE), closing="]", is_anywhere=False)
FORMATS = (HERMES, LLAMA3, DEEPSEEK_FENCED, DEEPSEEK, LIST)


def tool_format_of(chat_template: str | None) -> ToolFormat:
    """By what the template writes for calls of earlier turns. A plain JSON list where that is none of the known."""
    template = chat_template or ""
    if "<tool_call>" in template and '"arguments"' in template:
        return HERMES
    if _CALL_SEPARATOR in template:
        return DEEPSEEK_FENCED if "```json" in template else DEEPSEEK
    if '"parameters"' in template and '{"name": ' in template:
        return LLAMA3
    return LIST


def lark_of(
    tool_format: ToolFormat,
    tools: Sequence[CallableTool],
    *,
    must_call: bool,
    max_calls: int | None,
    text_schema: dict[str, object] | None = None,
) -> str:
    """A grammar of answers whose calls are valid, in llguidance's Lark.

    Unless `must_call`, any text is one, too, up to where a call begins, or what matches `text_schema` (only where
    `is_anywhere`: elsewhere JSON and calls begin alike).
    """
    limits = [limit for limit in (max_calls, tool_format.max_calls) if limit is not None]
    more = "" if limits and min(limits) == 1 else f"({_elements(tool_format, tool_format.separator)} call)*"
    rest = f"{more} {_mark(tool_format, tool_format.closing)}"
    rules = {
        "call": " | ".join(f"call_{nth}" for nth in range(len(tools))),
        "first": " | ".join(f"first_{nth}" for nth in range(len(tools))),
        "SPACE": r"/[ \n]{1,4}/",
        "ANY": r"/(.|\n)*/",
    }
    # The lexer takes the longest match and never goes back: what tells calls from text must be one piece.
    first, *others = tool_format.call
    assert isinstance(first, str)
    trigger = tool_format.trigger
    has_head = tool_format.is_anywhere and not must_call and text_schema is None
    begin = [tool_format.opening + first, *others]
    if has_head:
        begin[0] = begin[0].removeprefix(trigger)
    for nth, tool in enumerate(tools):
        rules[f"call_{nth}"] = _elements(tool_format, tool_format.call, tool)
        rules[f"first_{nth}"] = _elements(tool_format, begin, tool)
    loose = f"<[{','.join(map(str, tool_format.text_tokens))}]>" if tool_format.text_tokens else None
    if must_call:
        rules["start"] = f"first {rest}"
    elif text_schema is not None:
        assert tool_format.is_anywhere, "JSON and calls begin alike"
        rules["start"] = f"first {rest} | %json {json.dumps(text_schema)}"
    elif has_head:
        if loose:
            rules["text"] = f"(ANY? {loose})*"
        rules["head[lazy]"] = f"ANY {_quoted(trigger)}"
        begun = [f"head first {rest}"]
        if trigger in dict(tool_format.tokens):
            begun.append(f"ANY? {_mark(tool_format, trigger)} first {rest}")
        rules["start"] = " | ".join(f"{'text ' if loose else ''}{each}" for each in ("ANY?", *begun))
    else:
        rules["TEXT"] = rf"/(.|\n)*/ & ~/{_escaped(trigger)}(.|\n)*/"
        rules["start"] = f"TEXT | first {rest}"
        if loose:
            rules["start"] += f" | TEXT? {loose} ANY? ({loose} ANY?)*"
    return "".join(f"{name}: {body}\n" for name, body in rules.items())


def _elements(tool_format: ToolFormat, elements: Sequence[Element], tool: CallableTool | None = None) -> str:
    words: list[str] = []
    for element in elements:
        if element is Slot.SPACE:
            words.append("SPACE?")
        elif isinstance(element, str):
            words.append(_mark(tool_format, element))
        else:
            assert tool is not None
            words.append(_quoted(tool.name) if element is Slot.NAME else "%json " + json.dumps(tool.schema))
    return " ".join(words)


def _mark(tool_format: ToolFormat, text: str) -> str:
    """What stands for itself: its tokens by id, which text does not match, and the text between them."""
    ids = dict(tool_format.tokens)
    if not ids:
        return _quoted(text)
    pieces = re.split("(" + "|".join(map(re.escape, sorted(ids, key=len, reverse=True))) + ")", text)
    return " ".join(f"<[{ids[piece]}]>" if piece in ids else _quoted(piece) for piece in pieces if piece)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _escaped(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9 ]", lambda match: "\\" + match[0], text).replace(r"\"", '"')

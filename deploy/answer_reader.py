"""The text of a chat's answer as OpenAI tells it: content, and calls of tools."""

from __future__ import annotations

from uuid import uuid4

from deploy.completion import Piece
from deploy.openai_answers import (
    AssistantMessage,
    Delta,
    FinishOrCalls,
    FunctionCall,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from deploy.tool_calls import CallArguments, CallBegun, Content, ToolCallParser
from deploy.tool_format import ToolFormat


class AnswerReader:
    """Of one choice. Without a format there are no calls."""

    def __init__(self, tool_format: ToolFormat | None) -> None:
        self._parser = None if tool_format is None else ToolCallParser(tool_format, _new_id)

    def read(self, piece: Piece) -> Delta:
        if self._parser is None:
            return Delta(content=piece.text)
        events = self._parser.push(piece.text) + (self._parser.flush() if piece.finish is not None else [])
        content: str | None = None
        calls: list[ToolCallDelta] = []
        for event in events:
            match event:
                case Content(text):
                    content = (content or "") + text
                case CallBegun(call, call_id, name):
                    begun = FunctionDelta(name=name, arguments="")
                    calls.append(ToolCallDelta(index=call, id=call_id, type="function", function=begun))
                case CallArguments(call, text):
                    calls.append(ToolCallDelta(index=call, function=FunctionDelta(arguments=text)))
        return Delta(content=content, tool_calls=calls or None)

    def message(self, whole: Piece) -> AssistantMessage:
        delta = self.read(whole)
        calls: list[ToolCall] = []
        for part in delta.tool_calls or ():
            if part.id is not None:
                calls.append(ToolCall(id=part.id, function=FunctionCall(name=part.function.name or "", arguments="")))
            calls[part.index].function.arguments += part.function.arguments or ""
        return AssistantMessage(content=delta.content, tool_calls=calls or None)

    def finish(self, piece: Piece) -> FinishOrCalls | None:
        """After the piece was read."""
        has_calls = self._parser is not None and self._parser.num_calls > 0
        return "tool_calls" if has_calls and piece.finish == "stop" else piece.finish


def _new_id() -> str:
    return f"call_{uuid4().hex[:24]}"

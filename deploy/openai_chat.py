"""The messages of a chat, as OpenAI writes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from deploy.request_fields import Body, refused


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str
    arguments: str


class CalledTool(Body):
    id: str
    type: Literal["function"]
    function: CalledFunction


def _parts(content: object) -> object:
    """OpenAI's other parts (image_url, input_audio, file, refusal) are named in the refusal."""
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise ValueError(f"content parts of type {kind[:40]!r} are not supported; send text")
    return content


class ChatMessage(Body):
    """`content` may be absent only where there are tool_calls."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[TextPart] | None, BeforeValidator(_parts)] = None
    name: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=128)] = Field(default_factory=list)
    tool_call_id: str | None = None
    refusal: str | None = None
    audio: Annotated[None, refused("only text is understood; remove it")] = None
    function_call: Annotated[None, refused("it is called tool_calls now; use tool_calls")] = None

    @model_validator(mode="after")
    def _agree(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls belong to messages of the assistant, not of {self.role}; remove them")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id goes with role tool, and only with it; change one of the two")
        if self.content is None and self.refusal is None and not self.tool_calls:
            raise ValueError(f"you must provide content in a message of {self.role}")
        return self

    @property
    def text(self) -> str | None:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.refusal if self.content is None else self.content

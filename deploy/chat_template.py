"""A chat as the text that its model was trained on: the checkpoint's own template, fed with OpenAI's messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from cluster.errors import InvalidRequest
from deploy.openai_chat import CalledTool, ChatMessage
from deploy.openai_requests import Tool

if TYPE_CHECKING:
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

# What the renderer takes beside the template's own variables: not for clients.
_RESERVED: Final = frozenset(
    "conversation messages tools chat_template add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask "
    "tokenizer_kwargs processor_kwargs".split()
)
# Some templates join the arguments to other text as they are; the others say `| tojson`.
_JOINS_ARGUMENTS: Final = re.compile(
    r"""\+\s*\w+(\.function|\[['"]function['"]\])?(\.|\[['"])arguments(['"]\])?\s*\+"""
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """What the template is given. `variables` are its own, beside the usual ones."""

    messages: Sequence[ChatMessage]
    tools: Sequence[Tool] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


def render(fast: PreTrainedTokenizerFast, prompt: ChatPrompt) -> str:
    """Raises InvalidRequest when there is no template, or when it refuses."""
    from jinja2 import TemplateError

    if not fast.chat_template:
        raise InvalidRequest("the model has no chat template; use /v1/completions", "messages")
    taken = sorted(_RESERVED.intersection(prompt.variables))
    if taken:
        raise InvalidRequest(
            f"chat_template_kwargs: {taken[0]} is not the template's; remove it", "chat_template_kwargs"
        )
    template = fast.chat_template if isinstance(fast.chat_template, str) else ""
    as_text = _JOINS_ARGUMENTS.search(template) is not None
    try:
        plain: list[Any] = [_plain(message, arguments_as_text=as_text) for message in prompt.messages]
        text = fast.apply_chat_template(
            plain,
            tools=[tool.model_dump(exclude_unset=True) for tool in prompt.tools] or None,
            tokenize=False,
            add_generation_prompt=prompt.add_generation_prompt and not prompt.continue_final_message,
            continue_final_message=prompt.continue_final_message,
            **prompt.variables,
        )
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from None
    assert isinstance(text, str)
    return text


def _plain(message: ChatMessage, *, arguments_as_text: bool) -> dict[str, object]:
    """For a template, which knows system but seldom developer."""
    plain: dict[str, object] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(call, as_text=arguments_as_text) for call in message.tool_calls]
    return plain


def _plain_call(call: CalledTool, *, as_text: bool) -> dict[str, object]:
    """Raises ValueError for arguments that are no JSON object."""
    arguments = json.loads(call.function.arguments or "{}")
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {call.function.name} are no JSON object")
    given: object = call.function.arguments if as_text else arguments
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": given}}

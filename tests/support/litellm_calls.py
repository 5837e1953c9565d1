"""Run by litellm's own interpreter: URL, model and a file for what it returned, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import litellm  # pyright: ignore[reportMissingImports]

url, model, file = sys.argv[1:]
where = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}
messages = [{"role": "user", "content": "hi"}]
options = {"temperature": 0, "max_tokens": 6, "seed": 1, "logprobs": True, "top_logprobs": 1}
schema = {
    "type": "object",
    "properties": {"is_red": {"type": "boolean"}},
    "required": ["is_red"],
    "additionalProperties": False,
}
form = {"type": "json_schema", "json_schema": {"name": "fox", "schema": schema, "strict": True}}
tool = {"type": "function", "function": {"name": "paint", "description": "A fox.", "parameters": schema}}

chat = litellm.completion(messages=messages, **where, **options)
parts = litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **where, **options)
streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
formed = litellm.completion(messages=messages, response_format=form, temperature=0, max_tokens=40, **where)
called = litellm.completion(messages=messages, tools=[tool], tool_choice="required", max_tokens=60, seed=1, **where)
text = litellm.text_completion(
    prompt="def main():", max_tokens=6, temperature=0, **{**where, "model": f"text-completion-openai/{model}"}
)
vectors = litellm.embedding(input=["def main():", "import os"], **where)
try:
    litellm.completion(messages=messages, n=99, **where)
    refused = "nothing"
except litellm.BadRequestError as error:
    refused = type(error).__name__
returned = {
    "chat": chat.model_dump(),
    "streamed_is_whole": streamed == chat.choices[0].message.content,
    "formed_keys": sorted(json.loads(formed.choices[0].message.content)),
    "called": [
        {"name": call.function.name, "keys": sorted(json.loads(call.function.arguments))}
        for call in called.choices[0].message.tool_calls
    ],
    "text": text.model_dump(),
    "sizes": [len(each["embedding"]) for each in vectors.data],
    "refused": refused,
}
Path(file).write_text(json.dumps(returned, default=str))

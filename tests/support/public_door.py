"""The API as clients have it: Serve's port, two ingress replicas, real workers of the demo's checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from cluster.config_file import parse
from deploy import demo_checkpoint
from deploy.local_app import local_app
from deploy.tokenizer import Tokenizer

MODEL = "demo"
BLOCK_SIZE = 16
# As the demo's, with tools in Hermes' way; what a tool says must follow a call.
TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|end|>{% endif %}"
    "{% for message in messages %}"
    "{% set before = messages[loop.index0 - 1] %}"
    "{% if message.role == 'tool' and (loop.first or not (before.tool_calls or before.role == 'tool')) %}"
    "{{ raise_exception('no call asked for that') }}{% endif %}"
    "{% if message.role == 'tool' %}<|user|><tool_response>{{ message.content }}</tool_response>"
    "{% else %}<|{{ message.role }}|>{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class PublicDoor:
    url: str
    checkpoint: Path
    tokenizer: Tokenizer
    client: httpx.Client

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json={"model": MODEL, **body})

    def complete(self, **body: Any) -> dict[str, Any]:
        """Greedy unless asked otherwise."""
        return self._answer(self.post("/v1/completions", **{"temperature": 0, "ignore_eos": True, **body}))

    def chat(self, text: str, **body: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}]
        return self._answer(
            self.post("/v1/chat/completions", **{"temperature": 0, "ignore_eos": True, "messages": messages, **body})
        )

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a whole stream, which ends as OpenAI's do."""
        answer = self.post(path, **{"temperature": 0, "ignore_eos": True, "stream": True, **body})
        assert answer.status_code == 200, answer.text
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.backend.encode(text).ids

    def _answer(self, answer: httpx.Response) -> dict[str, Any]:
        assert answer.status_code == 200, answer.text
        return answer.json()


@contextmanager
def public_door(cache: Path) -> Iterator[PublicDoor]:
    checkpoint = _checkpoint(cache)
    tokenizer = Tokenizer.load(checkpoint)
    assert tokenizer is not None
    config = parse(
        {
            "name": "door",
            "model": {"path": str(checkpoint), "served_name": MODEL},
            "kv": {"num_blocks": 512, "block_size": BLOCK_SIZE},
            "words": {"heartbeat_timeout_s": 20.0},  # a busy machine is no failure here
            "router": {"local_prefill": "never"},
            "http": {"port": 0, "replicas": 2, "request_timeout_s": 60.0, "drain_s": 60.0},
        }
    )
    with local_app(config, lambda _: None) as app:
        with httpx.Client(base_url=app.url, timeout=60, trust_env=False) as client:
            yield PublicDoor(app.url, checkpoint, tokenizer, client)


def _checkpoint(cache: Path) -> Path:
    """The demo's, with a chat template that knows tools."""
    demo_checkpoint.ensure(cache)
    folder = cache / "with-tools"
    shutil.copytree(demo_checkpoint.place(cache), folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))
    return folder

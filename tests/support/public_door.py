"""The API as clients have it: Serve's port, two ingress replicas, real workers of the demo's checkpoint."""

from __future__ import annotations

import json
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
    demo_checkpoint.ensure(cache)
    checkpoint = demo_checkpoint.place(cache)
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

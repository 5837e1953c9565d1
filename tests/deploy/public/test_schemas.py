"""Two hundred random schemas through the public port: every answer is valid, streamed and whole."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest

from tests.support.public_door import PublicDoor
from tests.support.random_schemas import Schema, random_schemas

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

CHAT = "/v1/chat/completions"
NUM_SCHEMAS = 200
NUM_SHORT = 60  # without --full
NUM_CLIENTS = 16


def test_random_schemas_are_kept_streamed_and_whole(door: PublicDoor, request: pytest.FixtureRequest) -> None:
    """All streamed; some whole, too, and those are the same text."""

    def body(seed: int, schema: Schema) -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": f"number {seed}"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
            "temperature": 1.0,
            "seed": seed,
            "max_tokens": 1500,
            "ignore_eos": False,
        }

    def streamed(seed: int) -> tuple[str, str | None]:
        text, finish = "", None
        for chunk in door.stream(CHAT, **body(seed, schemas[seed])):
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                finish = choice["finish_reason"] or finish
        return text, finish

    def whole(seed: int) -> str:
        (choice,) = door.chat("", **body(seed, schemas[seed]))["choices"]
        return choice["message"]["content"]

    num_schemas = NUM_SCHEMAS if request.config.getoption("full") else NUM_SHORT
    schemas = random_schemas(num_schemas, seed=0)
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        texts = list(clients.map(streamed, range(num_schemas)))
        wholes = list(clients.map(whole, range(num_schemas // 5)))
    for schema, (text, finish) in zip(schemas, texts, strict=True):
        assert finish == "stop", (schema, text)
        jsonschema.validate(json.loads(text), schema)
    assert wholes == [text for text, _ in texts[: num_schemas // 5]]
    assert len({text for text, _ in texts}) > num_schemas // 2, "the model says one thing only"

"""The whole house: HTTP through Serve's public port, two ingress replicas, two prefill and two decode workers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx
import pytest

from cluster.config_file import parse
from deploy.local_app import local_app
from tests.support.checkpoints import VOCAB_SIZE, checkpoint, decided

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

NUM_TOKENS = 64
BLOCK_SIZE = 16


@dataclass(frozen=True)
class PublicPort:
    family: str
    url: str

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        settings = {"model": "model", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = httpx.post(
            f"{self.url}/v1/completions", json={**settings, "return_route": True, **body}, timeout=120, trust_env=False
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ask_all(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(len(bodies)) as threads:
            return list(threads.map(self.ask, bodies))


@pytest.fixture(scope="module", params=["llama", "deepseek-v32"])
def port(request: pytest.FixtureRequest) -> Iterator[PublicPort]:
    config = parse(
        {
            "name": "public",
            "model": {"path": str(checkpoint(request.param)), "served_name": "model"},
            "kv": {"num_blocks": 160, "block_size": BLOCK_SIZE},
            "scheduler": {"max_batched_tokens": 96, "chunk_tokens": 32, "max_sequences": 16},
            "pools": {"prefill": {"workers": 2}, "decode": {"workers": 2}},
            "router": {"local_prefill": "never"},
            "words": {"heartbeat_timeout_s": 20.0},  # a busy machine is no failure here
            "http": {"port": 0, "replicas": 2},
        }
    )
    with local_app(config, lambda _: None) as app:
        yield PublicPort(request.param, app.url)


def test_greedy_equals_transformers(port: PublicPort) -> None:
    random = Random(0)
    prompts = [[random.randrange(1, VOCAB_SIZE) for _ in range(random.randint(100, 160))] for _ in range(16)]
    runs = decided(port.family, tuple(map(tuple, prompts)), 8, NUM_TOKENS)
    answers = port.ask_all([{"prompt": run.prompt, "max_tokens": NUM_TOKENS} for run in runs])
    seen: set[int] = set()
    workers: set[str] = set()
    for run, answer in zip(runs, answers, strict=True):
        tokens = answer["choices"][0]["token_ids"]
        assert tokens == run.tokens
        seen.update(tokens)
        route = answer["usage"]["sluice"]
        hits = route["decode_prefix_hit_tokens"] // BLOCK_SIZE
        assert route["blocks"] == -(-len(run.prompt) // BLOCK_SIZE) - hits
        assert route["chunks"] >= 3 and route["transport"] == "nixl" and not route["local_prefill"]
        workers |= {route["prefill"]["name"], route["decode"]["name"]}
    assert len(seen) >= 100, f"{len(seen)} different tokens prove little"
    assert workers == {"prefill-0", "prefill-1", "decode-0", "decode-1"}


def test_stream_and_whole_answer_are_the_same(port: PublicPort) -> None:
    prompt = list(range(3, 90))
    whole = port.ask({"prompt": prompt, "max_tokens": 20, "seed": 7, "temperature": 0.9, "top_p": 0.9})
    tokens: list[int] = []
    body = {"model": "model", "prompt": prompt, "max_tokens": 20, "seed": 7, "temperature": 0.9, "top_p": 0.9}
    body |= {"stream": True, "ignore_eos": True, "return_token_ids": True}
    with httpx.stream("POST", f"{port.url}/v1/completions", json=body, timeout=60, trust_env=False) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        for choice in httpx.Response(200, text=line).json()["choices"]:
            tokens += choice.get("token_ids") or []
    assert tokens == whole["choices"][0]["token_ids"]


def test_health_models_and_metrics(port: PublicPort) -> None:
    with httpx.Client(base_url=port.url, trust_env=False) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["model"]
        metrics = client.get("/metrics").text
    assert 'sluice_words_sessions{peer_kind="worker"} 4.0' in metrics

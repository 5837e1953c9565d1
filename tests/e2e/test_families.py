"""Every family through `generate --cluster`: prompts computed by one process and answered by another."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from tests.support.checkpoints import VOCAB_SIZE, checkpoint, decided
from tests.support.commands import Command
from tests.support.families import served

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

NUM_TOKENS = 64
BLOCK_SIZE = 16
SETTINGS = (
    f"kv.block_size={BLOCK_SIZE}",
    "kv.num_blocks=160",
    "scheduler.chunk_tokens=32",
    "scheduler.max_batched_tokens=96",
    "words.heartbeat_timeout_s=20",
)


@pytest.mark.parametrize("family", served({"qwen3-moe"}))
def test_greedy_equals_transformers(family: str, tmp_path: Path) -> None:
    random = Random(0)
    prompts = [tuple(random.randrange(1, VOCAB_SIZE - 1) for _ in range(random.randint(70, 130))) for _ in range(24)]
    runs = decided(family, tuple(prompts), 8, NUM_TOKENS)
    asked = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f"{json.dumps({'prompt_token_ids': run.prompt, **asked})}\n" for run in runs))
    command = Command(
        "generate", "--cluster", "--explain", "--model", str(checkpoint(family)),
        "--input", str(source), "--output", str(output),
        *(word for setting in SETTINGS for word in ("--set", setting)),
    )  # fmt: skip
    assert command.wait() == 0, command.errors
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    seen: set[int] = set()
    for run, answer in zip(runs, answers, strict=True):
        assert answer["token_ids"] == run.tokens
        seen.update(run.tokens)
        route = answer["route"]
        assert route["plan"] == "disaggregated" and route["transport"] == "nixl" and not route["local_prefill"]
        assert route["prefill"]["pid"] != route["decode"]["pid"]
        assert route["blocks"] == -(-len(run.prompt) // BLOCK_SIZE) and route["bytes"] > 0
        assert route["chunks"] >= 3
    assert len(seen) >= 100, f"{len(seen)} different tokens prove little"
    assert command.left() == []

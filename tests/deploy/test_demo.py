"""`demo` from nothing to nothing: twice side by side, stopped by Ctrl-C, and unable to start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.commands import demo
from tests.support.commands import Command

KEYS = {
    *("plan", "prefill", "decode", "transport", "blocks", "bytes", "prefix_hit_tokens", "ttft_ms", "itl_ms"),
    *("text", "token_ids", "prompt_tokens", "chunks", "gb_per_s"),
}
BLOCK_SIZE = 16


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_demos_side_by_side_show_the_same_request_on_processes_of_their_own(tmp_path: Path) -> None:
    """They also write the same checkpoint at once, which only one of them gets to keep."""
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    cache = tmp_path / "cache"
    commands = [Command("demo", "--cache", str(cache), "--json", str(file)) for file in files]
    assert [command.wait() for command in commands] == [0, 0], commands[0].errors + commands[1].errors
    assert [command.left() for command in commands] == [[], []]
    assert not {p.pid for p in commands[0].family} & {p.pid for p in commands[1].family}
    assert [entry for entry in cache.iterdir() if not entry.name.startswith("deepseek-v32")] == []  # drafts, logs

    routes = [json.loads(file.read_text()) for file in files]
    for route, command in zip(routes, commands, strict=True):
        assert route.keys() >= KEYS
        assert route["plan"] == "disaggregated" and route["transport"] == "nixl" and not route["local_prefill"]
        assert route["chunks"] >= 3
        assert route["prefix_hit_tokens"] == 0
        assert route["blocks"] == -(-route["prompt_tokens"] // BLOCK_SIZE) >= 4
        assert route["bytes"] > 0 and route["gb_per_s"] > 0
        assert {route["prefill"]["pid"], route["decode"]["pid"]} < {p.pid for p in command.family}
        assert len(route["token_ids"]) == 48 and len(set(route["token_ids"])) > 24
        for word in ("random", route["prefill"]["incarnation"][:12], str(route["decode"]["pid"]), "7 blocks"):
            assert word in command.output
        assert command.errors == ""
        assert [word for word in ("Traceback", "WARNING", "INFO", "raylet", "(pid=") if word in command.output] == []
        assert max(map(len, command.output.splitlines())) <= 80
    first, second = routes
    assert (first["text"], first["token_ids"]) == (second["text"], second["token_ids"])
    workers = {route[stage]["incarnation"] for route in routes for stage in ("prefill", "decode")}
    assert len(workers) == 4


@pytest.mark.cluster
@pytest.mark.slow
def test_an_interrupted_demo_leaves_nothing_and_is_no_failure(tmp_path: Path) -> None:
    command = Command("demo", "--cache", str(tmp_path))
    command.descendant(lambda words: any("raylet" in word for word in words))
    command.interrupt()
    assert command.wait() == 0, command.errors
    assert command.left() == []
    assert "Traceback" not in command.output + command.errors
    assert not list(tmp_path.glob("*.log"))


def test_a_config_that_does_not_fit_ends_it_before_anything_starts(tmp_path: Path) -> None:
    command = Command("demo", "--cache", str(tmp_path), "--set", "kv.blok_size=16")
    assert command.wait() == 1
    assert command.errors == "error: kv.blok_size: there is no such key; did you mean kv.block_size?\n"
    assert not list(tmp_path.glob("*.log"))


def test_control_characters_of_the_noise_do_not_reach_the_terminal() -> None:
    assert demo._printable("a\x1b[2Jb\n\tc\u202e") == "a·[2Jb··c·"

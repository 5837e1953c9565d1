"""`demo` from nothing to nothing: two side by side, one of them stopped by Ctrl-C, and one that cannot start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.commands import demo
from tests.support.commands import Command

KEYS = {
    *("plan", "prefill", "decode", "transport", "blocks", "bytes", "prefix_hit_tokens", "ttft_ms", "itl_ms"),
    *("text", "token_ids", "prompt_tokens", "chunks", "gb_per_s"),
}
BLOCK_SIZE = 16


class Demo:
    """One run of the command; several share a cache, and write the same checkpoint at once."""

    def __init__(self, folder: Path, name: str) -> None:
        self.file = folder / f"{name}.json"
        self.cache = folder / "cache"
        self.command = Command("demo", "--cache", str(self.cache), "--json", str(self.file))

    def interrupted(self) -> None:
        """Ctrl-C as soon as there is a raylet: no failure, and nothing is left."""
        self.command.descendant(lambda words: any("raylet" in word for word in words))
        self.command.interrupt()
        self._ended()
        assert "Traceback" not in self.command.output + self.command.errors

    def route(self) -> dict[str, Any]:
        """What it tells of its request in its file, once it has ended well; to people it tells the same."""
        self._ended()
        output = self.command.output
        route = json.loads(self.file.read_text())
        assert route.keys() >= KEYS
        assert route["plan"] == "disaggregated" and route["transport"] == "nixl" and not route["local_prefill"]
        assert route["chunks"] >= 3
        assert route["prefix_hit_tokens"] == 0
        assert route["blocks"] == -(-route["prompt_tokens"] // BLOCK_SIZE) >= 4
        assert route["bytes"] > 0 and route["gb_per_s"] > 0
        assert {route["prefill"]["pid"], route["decode"]["pid"]} < {p.pid for p in self.command.family}
        assert len(route["token_ids"]) == 48 and len(set(route["token_ids"])) > 24
        for word in ("random", route["prefill"]["incarnation"][:12], str(route["decode"]["pid"]), "7 blocks"):
            assert word in output
        assert self.command.errors == ""
        assert [word for word in ("Traceback", "WARNING", "INFO", "raylet", "(pid=") if word in output] == []
        assert max(map(len, output.splitlines())) <= 80
        return route

    def _ended(self) -> None:
        assert self.command.wait() == 0, self.command.errors
        assert self.command.left() == []


def left_in(cache: Path) -> list[str]:
    """Drafts and logs: all but the checkpoint, which only one of the writers gets to keep."""
    return [entry.name for entry in cache.iterdir() if not entry.name.startswith("deepseek-v32")]


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_demo_shows_a_request_beside_one_that_is_interrupted_and_both_leave_nothing(tmp_path: Path) -> None:
    shown, other = Demo(tmp_path, "shown"), Demo(tmp_path, "other")
    other.interrupted()
    shown.route()
    assert left_in(shown.cache) == []


@pytest.mark.full
@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_demos_side_by_side_show_the_same_request_on_processes_of_their_own(tmp_path: Path) -> None:
    demos = [Demo(tmp_path, name) for name in ("first", "second")]
    first, second = (each.route() for each in demos)
    assert not {p.pid for p in demos[0].command.family} & {p.pid for p in demos[1].command.family}
    assert (first["text"], first["token_ids"]) == (second["text"], second["token_ids"])
    assert len({route[stage]["incarnation"] for route in (first, second) for stage in ("prefill", "decode")}) == 4
    assert left_in(demos[0].cache) == []


def test_a_config_that_does_not_fit_ends_it_before_anything_starts(tmp_path: Path) -> None:
    command = Command("demo", "--cache", str(tmp_path), "--set", "kv.blok_size=16")
    assert command.wait() == 1
    assert command.errors == "error: kv.blok_size: there is no such key; did you mean kv.block_size?\n"
    assert not list(tmp_path.glob("*.log"))


def test_control_characters_of_the_noise_do_not_reach_the_terminal() -> None:
    assert demo._printable("a\x1b[2Jb\n\tc\u202e") == "a·[2Jb··c·"

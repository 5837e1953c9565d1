"""`chat` as a person has it, on a terminal, and as a script does, through pipes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config_file import load
from deploy.__main__ import main
from deploy.local_front import LocalFront
from tests.support.checkpoints import checkpoint
from tests.support.commands import Command
from tests.support.terminal import CTRL_C, CTRL_D, Terminal
from tests.support.tokenizer_files import write_tokenizer

NUM_TOKENS = 500  # enough to be stopped on the way

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one that never ends by itself, and has room for long answers."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    settings = json.loads((checkpoint("llama") / "config.json").read_text())
    settings |= {"max_position_embeddings": 8192, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").symlink_to(checkpoint("llama") / "model.safetensors")
    write_tokenizer(folder)
    return folder


def test_a_conversation_on_a_terminal(model: Path) -> None:
    words = ["--model", str(model), "--system", "never say never " * 4, "--temperature", "0"]
    with Terminal("chat", *words, "--max-tokens", str(NUM_TOKENS)) as terminal:
        figures = rf"{NUM_TOKENS} tokens, cut there · the first after \d+ ms · [\d.]+ tok/s"
        terminal.until("you> ")
        terminal.type("the quick fox\n")
        first = terminal.until(figures + r" · prompt of (\d+), (\d+) of them a prefix hit")
        assert int(first[1]) > 16 and first[2] == "0"
        terminal.until("you> ")
        terminal.type("and the dog\n")
        second = terminal.until(figures + r" · prompt of (\d+), (\d+) of them a prefix hit")
        assert int(second[1]) > int(second[2]) >= int(first[1]) // 16 * 16 > 0
        terminal.until("you> ")
        terminal.type("jumps over\n")
        terminal.until(r"jumps over\s+\S")
        terminal.type(CTRL_C)
        assert 0 < int(terminal.until(r"stopped after (\d+) tokens · the first after")[1]) < NUM_TOKENS
        terminal.until("you> ")
        terminal.type("/reset\n")
        terminal.until("forgotten")
        terminal.until("you> ")
        terminal.type("/help me\n")
        terminal.until(r"/help me\s+\S")
        terminal.type(CTRL_C)
        terminal.until("stopped after")
        terminal.until("you> ")
        terminal.until_it_waits()
        terminal.type(CTRL_C)
        terminal.until("Ctrl-D or /quit ends")
        terminal.until("you> ")
        terminal.type("/leave\n")
        terminal.until("there is no /leave; /reset")
        terminal.until("you> ")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.shown


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = {"model.path": str(model), "kv.num_blocks": 64, "kv.block_size": 8, "log.level": "error"}
    front = LocalFront(load(None, (), settings), tmp_path_factory.mktemp("front"), lambda _: None)
    try:
        yield front.start()
    finally:
        front.stop()


def test_questions_from_a_pipe_to_a_running_cluster(url: str) -> None:
    words = ["--url", f"{url}/v1/", "--max-tokens", "4", "--temperature", "0", "--system", "the lazy dog"]
    talk = "the quick brown fox\n\nand over\n/reset\nthe quick brown fox\n/quit\nnot asked\n"
    command = Command("chat", *words, stdin=talk)
    assert command.wait() == 0, command.errors
    assert command.left() == [] and command.family == set(), "it started nothing"
    first, second, third = (text for text in command.errors.splitlines() if "tokens" in text)
    assert "4 tokens, cut there" in first and first.endswith(" 0 of them a prefix hit")
    assert not second.endswith(" 0 of them a prefix hit")
    assert "forgotten" in command.errors
    assert first.partition("prompt of ")[2].split()[0] == third.partition("prompt of ")[2].split()[0]
    assert not command.output.startswith("you>") and "tokens" not in command.output


def test_what_cannot_be_talked_to_is_named(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*words: str) -> str:
        assert main(["chat", *words]) == 1
        return capsys.readouterr().err

    assert "--url http://127.0.0.1:1 does not answer as a model server" in error("--url", "http://127.0.0.1:1")
    assert f"--url {url} serves tiny, not other; remove --model" in error("--url", url, "--model", "other")
    assert "--set cannot change the cluster behind --url" in error("--url", url, "--set", "kv.num_blocks=3")
    assert "config.json: No such file" in error("--model", str(tmp_path))
    (tmp_path / "config.json").write_text((checkpoint("llama") / "config.json").read_text())
    assert f"{tmp_path} has no tokenizer" in error("--model", str(tmp_path))
    too_long = Command("chat", "--url", url, "--max-tokens", "9000", stdin="the fox\n")
    assert too_long.wait() == 1
    assert "error: the front door answers 4" in too_long.errors and "ask for at most" in too_long.errors

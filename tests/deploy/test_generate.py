"""`generate` over real worker processes: the answers, who gave them, and what is left afterwards."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.config import SluiceConfig
from deploy.__main__ import main
from deploy.commands import generate
from tests.support.checkpoints import checkpoint, greedy_each, ragged_prompts
from tests.support.commands import Command
from tests.support.tokenizer_files import write_tokenizer

NUM_TOKENS = 12
SMALL = ("kv.block_size=8", "kv.num_blocks=200", "scheduler.chunk_tokens=16")

pytestmark = pytest.mark.timeout(240)


def line(prompt: Sequence[int], **options: object) -> dict[str, object]:
    return {"prompt_token_ids": list(prompt), "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, **options}


class Job:
    """One run of the command on files in `folder`."""

    def __init__(
        self, folder: Path, lines: Sequence[object], *words: str, model: Path | None = None, output: str = "out.jsonl"
    ) -> None:
        self.output = folder / output
        source = folder / "in.jsonl"
        source.write_text("".join(f"{text if isinstance(text, str) else json.dumps(text)}\n" for text in lines))
        settings = [word for override in SMALL for word in ("--set", override)]
        files = ["--model", str(model or checkpoint("llama")), "--input", str(source), "--output", str(self.output)]
        self.command = Command("generate", *files, *settings, *words)

    def worker(self, pool: str) -> Any:
        return self.command.descendant(lambda words: "workers.standalone" in words and pool in words)

    def until_first_answer(self) -> None:
        assert self.command.until(lambda: self.output.exists() and b"\n" in self.output.read_bytes())

    def answers(self, status: int = 0) -> list[dict[str, Any]]:
        """What is in the output, after checking that nothing else is left."""
        assert self.command.wait() == status, self.command.errors
        assert self.command.left() == []
        return [json.loads(text) for text in self.output.read_text().splitlines()]


@pytest.mark.cluster
def test_prompts_are_computed_by_one_process_and_answered_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although UCX writes to the standard output of every worker, where workers say who they are."""
    monkeypatch.setenv("UCX_LOG_LEVEL", "info")
    prompts = ragged_prompts(6)
    lines = [line(prompt) for prompt in prompts]
    lines.insert(2, line([]))
    lines.insert(4, line([100_000]))
    job = Job(tmp_path, lines, "--cluster", "--explain")
    answers = job.answers()
    assert [index for index, answer in enumerate(answers) if "error" in answer] == [2, 4]
    assert answers[2]["error"]["param"] == "prompt_token_ids"
    assert "token id 100000 is outside the vocabulary of 512" in answers[4]["error"]["message"]

    pids = {process.pid for process in job.command.family}
    served = [answer for answer in answers if "error" not in answer]
    assert [answer["token_ids"] for answer in served] == greedy_each("llama", prompts, NUM_TOKENS)
    for prompt, answer in zip(prompts, served, strict=True):
        assert answer["finish_reason"] == "length"
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        route = answer["route"]
        assert route["plan"] == "disaggregated" and route["transport"] == "nixl" and not route["local_prefill"]
        assert route["prefill"]["pid"] != route["decode"]["pid"]
        assert {route["prefill"]["pid"], route["decode"]["pid"]} <= pids
        assert route["prefill"]["incarnation"] != route["decode"]["incarnation"]
        assert 0 < route["blocks"] <= -(-len(prompt) // 8) and route["bytes"] > 0
    assert "6 answers, 2 lines with errors; 72 tokens" in job.command.errors


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The tiny one, with a tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint("llama").iterdir():
        (folder / file.name).symlink_to(file)
    write_tokenizer(folder)
    return folder


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.full
def test_a_killed_job_goes_on_to_the_file_of_an_unhindered_one(tmp_path: Path, model: Path) -> None:
    prompts = ragged_prompts(2)
    drawn = [{"prompt_token_ids": prompt, "max_tokens": 300, "ignore_eos": True} for prompt in (*prompts, *prompts)]
    lines = [
        *(line(prompt) for prompt in prompts),
        "no JSON",
        "",
        {"prompt": "the quick fox", "max_tokens": 6, "n": 2, "temperature": 2},
        {"messages": [{"role": "user", "content": "the lazy dog"}], "max_tokens": 5, "temperature": 0},
        *drawn,
    ]
    whole = Job(tmp_path, lines, "--explain", model=model, output="whole.jsonl")
    first, second, bad, blank, several, chat, *long = answers = whole.answers()
    assert [first["token_ids"], second["token_ids"]] == greedy_each("llama", prompts, NUM_TOKENS)
    for answer in (first, second):
        assert answer["route"]["plan"] == "aggregated" and answer["route"]["prefill"] is None
        assert answer["route"]["blocks"] == 0 and isinstance(answer["text"], str)
    assert bad.keys() == blank.keys() == {"error"}
    assert several["usage"]["completion_tokens"] == 12 and len(several["routes"]) == 2
    assert several["choices"][0]["token_ids"] != several["choices"][1]["token_ids"]
    assert chat["usage"]["prompt_tokens"] > 1 and chat["text"]
    assert [len(answer["token_ids"]) for answer in long] == [300] * 4
    assert long[0]["token_ids"] != long[2]["token_ids"], "equal lines draw tokens of their own"
    assert "answering: 10 of 10 lines, " in whole.command.errors

    killed = Job(tmp_path, lines, model=model)
    killed.until_first_answer()
    killed.command.kill()
    kept = killed.answers(-signal.SIGKILL)
    assert 1 <= len(kept) < len(lines)
    with killed.output.open("ab") as file:
        file.write(b'{"fingerprint":"torn')
    resumed = Job(tmp_path, lines, "--resume", model=model)
    unexplained = [{key: value for key, value in answer.items() if "route" not in key} for answer in answers]
    assert resumed.answers() == unexplained
    assert f"{len(kept)} of 10 answers are there" in resumed.command.errors

    done = resumed.output.read_bytes()
    again = Job(tmp_path, lines, "--resume", model=model)
    assert again.answers() == unexplained and again.output.read_bytes() == done
    assert "all 10 answers are there" in again.command.errors and not again.command.family


@pytest.mark.cluster
def test_random_weights_from_standard_input_to_standard_output(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint("llama") / "config.json").read_text())
    words = ["--load-format", "dummy", "--input", "-", "--output", "-", "--set", "kv.num_blocks=20"]
    command = Command("generate", "--model", str(tmp_path), *words, stdin=json.dumps(line([1, 2, 3])) + "\n")
    assert command.wait() == 0, command.errors
    assert command.left() == []
    (answer,) = [json.loads(text) for text in command.output.splitlines()]
    assert len(answer["token_ids"]) == NUM_TOKENS and answer["text"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.cluster
def test_a_killed_decode_worker_is_replaced_and_every_answer_whole(tmp_path: Path) -> None:
    prompts = ragged_prompts(4)
    lines = [line(prompts[0]), *(line(prompt, max_tokens=200) for prompt in prompts)]
    job = Job(tmp_path, lines, "--cluster", "--explain")
    decode = job.worker("decode")
    job.until_first_answer()  # the others have 200 tokens to go
    decode.kill()
    answers = job.answers()
    expected = greedy_each("llama", prompts, 200)
    assert [answer["token_ids"] for answer in answers] == [expected[0][:NUM_TOKENS], *expected]
    assert [answer["route"]["attempts"] for answer in answers] == [1, 2, 2, 2, 2]
    assert not any(answer["route"]["local_prefill"] for answer in answers)


@pytest.mark.cluster
def test_an_interrupted_job_keeps_what_it_has_and_leaves_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path, [line([1, 2, 3])], "--cluster")
    job.worker("decode")
    job.command.interrupt()
    assert job.answers(generate.INTERRUPTED) == []
    assert "the same command with --resume goes on" in job.command.errors and "Traceback" not in job.command.errors


def test_weights_that_are_missing_end_it_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint("llama") / "config.json").read_text())
    job = Job(tmp_path, [line([1])], model=tmp_path)
    assert job.answers(1) == []
    assert "error: mixed-0: " in job.command.errors and "model.safetensors" in job.command.errors


def test_files_that_do_not_do_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, model = tmp_path / "in.jsonl", str(checkpoint("llama"))
    absent = str(tmp_path / "no" / "file")

    def error(*words: str) -> str:
        assert main(["generate", "--model", model, *words]) == 1
        return capsys.readouterr().err

    assert f"--input {absent} cannot be read: No such file" in error("--input", absent, "--output", "x")
    source.write_text("{}\n")
    assert f"--output {source} is the input" in error("--input", str(source), "--output", str(source))
    assert f"--output {absent} cannot be written" in error("--input", str(source), "--output", absent)
    assert "--resume needs a file" in error("--input", str(source), "--output", "-", "--resume")
    assert not source.with_name("x").exists()


def test_a_model_that_is_not_there_is_named_and_no_file_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_text("{}\n")
    files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(["generate", "--model", str(tmp_path / "none"), *files]) == 1
    assert f"{tmp_path / 'none' / 'config.json'}: No such file" in capsys.readouterr().err
    assert main(["generate", *files]) == 1
    assert "model.path: is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def configured(*words: str, **options: object) -> SluiceConfig:
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    return generate.configured(parser.parse_args(["--model", "m", "--input", "i", "--output", "o", *words]))


@pytest.mark.parametrize(
    ("words", "pools", "local_prefill"),
    [
        (["--cluster"], {"prefill": 1, "decode": 1}, "never"),
        (["--cluster", "--set", "router.local_prefill=fallback"], {"prefill": 1, "decode": 1}, "fallback"),
        (["--cluster", "--config", "deploy/configs/cpu-disaggregated.yaml"], {"prefill": 1, "decode": 1}, "fallback"),
        (["--cluster", "--aggregated", "--set", "pools.decode.workers=3"], {"mixed": 4}, "always"),
        ([], {"mixed": 1}, "always"),
    ],
)
def test_the_pools_and_who_computes_prompts(words: list[str], pools: Mapping[str, int], local_prefill: str) -> None:
    config = configured(*words)
    assert {name: pool.workers for name, pool in config.pools.items()} == pools
    assert config.router.local_prefill == local_prefill


def test_what_the_config_says_counts() -> None:
    plain = configured("--cluster")
    assert plain.http.request_timeout_s > 3600 and plain.kv.memory_bytes is not None
    said = configured("--cluster", "--set", "http.request_timeout_s=7", "--set", "kv.num_blocks=9")
    assert said.http.request_timeout_s == 7
    assert (said.kv.num_blocks, said.kv.memory_bytes) == (9, None)

"""litellm, lm-eval and guidellm, unchanged, in environments of their own, against the public port.

Where they are not installed, what they sent once is sent again: tests/fixtures keep it, with what was answered.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import guidellm_driver
from tests.support.public_door import MODEL, PublicDoor
from tests.support.recording_proxy import exchange, recording_proxy
from tests.support.recordings import (
    FIXTURES,
    IS_RECORDING,
    assert_as_recorded,
    record_requests,
    recorded_requests,
    shape_of_answer,
)

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[3]
ENVIRONMENTS = {
    "litellm": ROOT / ".cache" / "clients" / "litellm",
    "lm-eval": ROOT / ".cache" / "clients" / "lm-eval",
    "guidellm": guidellm_driver.VENV,
}
SETTINGS = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "GUIDELLM__MAX_WORKER_PROCESSES": "1"}


def run(client: str, program: str, *arguments: str) -> None:
    binary = ENVIRONMENTS[client] / "bin" / program
    if not binary.exists():
        pytest.skip(f"{client}: needs `make clients`")
    done = subprocess.run(
        [str(binary), *arguments],
        env={**os.environ, **SETTINGS},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]


@contextmanager
def port(door: PublicDoor, client: str) -> Iterator[str]:
    """The public port itself, unless what the client sends is to be recorded."""
    if not IS_RECORDING:
        yield door.url
        return
    with recording_proxy(door.url) as proxy:
        yield proxy.url
    record_requests(client, proxy.exchanges)


def test_litellm(door: PublicDoor, tmp_path: Path) -> None:
    script = ROOT / "tests" / "support" / "litellm_calls.py"
    with port(door, "litellm") as url:
        run("litellm", "python", str(script), url, MODEL, str(tmp_path / "returned.json"))
    returned = json.loads((tmp_path / "returned.json").read_text())
    assert returned["streamed_is_whole"] and returned["sizes"] == [96, 96]
    assert_as_recorded("litellm-returned", returned)


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda each: each["doc_id"])


def test_lm_eval(door: PublicDoor, tmp_path: Path) -> None:
    """Choices are scored by the logprobs of an echoed prompt; the answers of the other task are written."""
    given = FIXTURES / "lm_eval_task"
    for task in ("foxes", "tales"):
        (tmp_path / f"{task}.yaml").write_text((given / f"{task}.yaml").read_text().replace("FOLDER", str(given)))
    with port(door, "lm-eval") as url:
        model = (
            f"model={MODEL},base_url={url}/v1/completions,tokenizer={door.checkpoint},num_concurrent=2,max_retries=1"
        )
        run(
            "lm-eval", "lm_eval", "--model", "local-completions", "--model_args", model, "--include_path",
            str(tmp_path), "--tasks", "foxes,tales", "--output_path", str(tmp_path / "out"), "--log_samples",
        )  # fmt: skip
    scored, written = samples(tmp_path / "out", "foxes"), samples(tmp_path / "out", "tales")
    for sample in scored:
        question = sample["doc"]["question"]
        num_given = len(door.ids(question.rstrip()))  # lm-eval counts a space before the choice as part of it
        for ((score, _),), choice in zip(sample["resps"], sample["doc"]["choices"], strict=True):
            echoed = door.complete(prompt=question + choice, max_tokens=0, echo=True, logprobs=1)["choices"][0]
            assert float(score) == pytest.approx(sum(echoed["logprobs"]["token_logprobs"][num_given:]), abs=1e-3)
    for sample in written:
        options = {"max_tokens": 8, "stop": ["\n\n", "</end>"], "ignore_eos": False}
        expected = door.complete(prompt=sample["doc"]["question"], **options)["choices"][0]["text"]
        assert sample["resps"] == [[expected]]
    told = {
        "scored": [[is_greedy for ((_, is_greedy),) in sample["resps"]] for sample in scored],
        "written": [[len(texts) for texts in sample["resps"]] for sample in written],
    }
    assert_as_recorded("lm-eval-returned", told)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm(door: PublicDoor, tmp_path: Path, path: str) -> None:
    """With synthetic prompts of its own."""
    report, name = tmp_path / "report.json", "guidellm" + path.removesuffix("/completions").replace("/", "-")
    with port(door, name) as url:
        backend = f"kind=openai_http,target={url},model={MODEL},request_format={path}"
        run(
            "guidellm", "guidellm", "run", "--backend", backend, "--profile", "kind=synchronous",
            "--constraint", "kind=max_requests,count=4", "--tokenizer", f"kind=hf_auto,model={door.checkpoint}",
            "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8", "--seed", "kind=static,value=7",
            "--output", f"kind=json,path={report}", "--disable-console",
        )  # fmt: skip
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    found = benchmark["requests"]
    assert len(found["successful"]) == 4 and not found["errored"] and not found["incomplete"]
    names = ("prompt_tokens", "cached_tokens", "output_tokens", "total_tokens", "tool_calls", "reasoning_output")
    told = [{name: request[name] for name in names} for request in found["successful"]]
    assert_as_recorded(f"{name}-returned", told)


@pytest.mark.parametrize("client", ["litellm", "lm-eval", "guidellm-v1", "guidellm-v1-chat"])
def test_what_a_client_sent_is_answered_as_it_was(door: PublicDoor, client: str) -> None:
    kept = recorded_requests(client)
    assert any(each.method == "POST" for each in kept)
    for each in kept:
        again = exchange(door.client, each.method, each.path, each.body)
        assert (again.status, shape_of_answer(again.answer)) == (each.status, each.answer), each.body

"""litellm, lm-eval and guidellm, unchanged, in environments of their own, against the public port."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.public_door import MODEL, PublicDoor
from tests.support.recordings import FIXTURES, assert_as_recorded

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[3]


def run(client: str, program: str, *arguments: str) -> None:
    binary = ROOT / ".cache" / "clients" / client / "bin" / program
    if not binary.exists():
        pytest.skip(f"{client}: needs `make clients`")
    done = subprocess.run(
        [str(binary), *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]


def test_litellm(door: PublicDoor, tmp_path: Path) -> None:
    script = ROOT / "tests" / "support" / "litellm_calls.py"
    run("litellm", "python", str(script), door.url, MODEL, str(tmp_path / "returned.json"))
    returned = json.loads((tmp_path / "returned.json").read_text())
    assert returned["streamed_is_whole"] and returned["sizes"] == [96, 96]
    assert_as_recorded("litellm", returned)


def test_lm_eval_scores_with_prompt_logprobs(door: PublicDoor, tmp_path: Path) -> None:
    """A local task of choices: each is scored by the logprobs of an echoed prompt."""
    task = FIXTURES / "lm_eval_task"
    written = (task / "foxes.yaml").read_text().replace("FOLDER", str(task))
    (tmp_path / "foxes.yaml").write_text(written)
    model = (
        f"model={MODEL},base_url={door.url}/v1/completions,tokenizer={door.checkpoint},num_concurrent=2,max_retries=1"
    )
    run(
        "lm-eval", "lm_eval", "--model", "local-completions", "--model_args", model, "--include_path", str(tmp_path),
        "--tasks", "foxes", "--output_path", str(tmp_path / "out"), "--log_samples",
    )  # fmt: skip
    (samples,) = (tmp_path / "out").rglob("samples_foxes_*.jsonl")
    answered = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(answered) == 4
    for sample in answered:
        for ((score, _),), choice in zip(sample["resps"], sample["doc"]["choices"], strict=True):
            question = sample["doc"]["question"]
            echoed = door.complete(prompt=question + choice, max_tokens=1, echo=True, logprobs=1)["choices"][0]
            own = zip(echoed["logprobs"]["text_offset"], echoed["logprobs"]["token_logprobs"], strict=True)
            expected = sum(told for at, told in own if len(question) <= at < len(question + choice))
            assert float(score) == pytest.approx(expected, abs=0.02)


def test_guidellm(door: PublicDoor, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run(
        "guidellm", "guidellm", "benchmark", "--target", door.url, "--model", MODEL, "--rate-type", "synchronous",
        "--max-requests", "4", "--data", "prompt_tokens=32,output_tokens=8", "--processor", str(door.checkpoint),
        "--output-path", str(report),
    )  # fmt: skip
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) == 4 and not requests["errored"]
    assert {each["output_tokens"] for each in requests["successful"]} == {8}

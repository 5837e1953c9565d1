"""guidellm as it is published: installed beside sluice, told what to do by its command line, read by its JSON report.

It has an environment of its own in .cache, because it wants other versions of packages that sluice pins (click,
multidict). Requests are ours, in a file; the times of arrival are guidellm's.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError, field_validator

from benchmarks.arrivals import Workload
from benchmarks.client import Endpoint, Sample
from benchmarks.report import ROOT, progress

PINS = ("guidellm==0.8.1", "torch==2.13.0", "transformers==5.23.0")
VENV = ROOT / ".cache" / "venv-guidellm"
_SIZE = "about 0.4 GB to download, 1.2 GB on disk (several GB more where the package index serves torch with CUDA)"
_STAMP = "sluice-pins"  # in the environment, once it is complete
_MAX_LOG_LINES = 20


def ensure(directory: Path = VENV, pins: Sequence[str] = PINS) -> Path:
    """The program, installed unless it is. Raises RuntimeError with the remedy."""
    stamp = directory / _STAMP
    wanted = "\n".join(pins) + "\n"
    if not stamp.is_file() or stamp.read_text() != wanted:
        progress(f"guidellm: installing {' '.join(pins)} into {directory}: {_SIZE}")
        stamp.unlink(missing_ok=True)
        venv.create(directory, symlinks=True, with_pip=True)
        command = [str(directory / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", *pins]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            remedy = "see pip's words above; it needs a package index, or leave out --driver guidellm"
            raise RuntimeError(f"guidellm could not be installed into {directory}: {remedy}")
        stamp.write_text(wanted)
    return directory / "bin" / "guidellm"


def command(program: Path, endpoint: Endpoint, workload: Workload, directory: Path) -> list[str]:
    """Poisson arrivals, for rate 0 one request after the other."""
    rate = workload.rate
    backend = f"target={endpoint.url},model={endpoint.model},timeout={endpoint.timeout_s:g}"
    return [
        str(program),
        "run",
        "--backend",
        f"kind=openai_http,{backend},request_format=/v1/completions",
        "--profile",
        f"kind=poisson,rate={rate:g}" if rate else "kind=synchronous",
        "--constraint",
        f"kind=max_requests,count={workload.num_requests}",
        "--data",
        f"kind=json_file,path={directory / 'requests.jsonl'}",
        "--seed",
        f"kind=static,value={workload.seed % 2**31}",
        "--output",
        f"kind=json,path={directory / 'report.json'}",
        "--disable-console",
    ]


async def send(
    program: Path, endpoint: Endpoint, workload: Workload, directory: Path
) -> tuple[list[Sample], Mapping[str, float]]:
    """Every prompt of the workload once, in order; what became of them, and guidellm's own figures in ms.

    Its TTFT counts from when it sent a request, that of samples from when it was due. Files lie in `directory`. Raises
    RuntimeError when guidellm fails or its report cannot be read.
    """
    arrivals = workload.arrivals()
    rows = [
        {"prompt": each.text, "prompt_tokens_count": len(each.prompt), "output_tokens_count": each.num_tokens}
        for each in arrivals
    ]
    (directory / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = directory / "guidellm.log"
    with log.open("wb") as out:
        running = await asyncio.create_subprocess_exec(
            *command(program, endpoint, workload, directory),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=directory,
            env={**os.environ, **_settings(directory)},
        )
        try:
            status = await running.wait()
        finally:
            if running.returncode is None:
                running.kill()
    if status:
        lines = log.read_text(errors="replace").splitlines()[-_MAX_LOG_LINES:]
        raise RuntimeError("\n".join([f"guidellm ended with exit status {status}; its last words:", *lines]))
    samples, said = read((directory / "report.json").read_text())
    if len(samples) != len(arrivals):
        raise RuntimeError(f"guidellm reports {len(samples)} requests of {len(arrivals)}")
    return samples, said


def _settings(directory: Path) -> dict[str, str]:
    """One worker process: each takes seconds to start, and few cores are the server's, too."""
    return {
        "GUIDELLM__MAX_WORKER_PROCESSES": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(directory),
        "NO_PROXY": "127.0.0.1,localhost",
    }


# ---------------------------------------------------------------- its report


class _Timings(BaseModel):
    """Seconds since 1970."""

    targeted_start: float | None = None
    request_start: float | None = None
    first_token_iteration: float | None = None
    last_token_iteration: float | None = None


class _Info(BaseModel):
    timings: _Timings
    error: str | None = None


class _Body(BaseModel):
    max_tokens: int


class _Arguments(BaseModel):
    body: _Body


class _Request(BaseModel):
    request_args: _Arguments
    info: _Info
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None

    @field_validator("request_args", mode="before")
    @classmethod
    def _parse(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    def sample(self, due: float, start: float, *, failed: bool) -> Sample:
        timings = self.info.timings
        first, last = timings.first_token_iteration, timings.last_token_iteration
        times = [] if first is None or last is None else [first - due, last - due]
        unfinished = "did not end" if failed or not times else ""
        return Sample(
            due_s=due - start,
            num_prompt_tokens=self.prompt_tokens or 0,
            num_wanted=self.request_args.body.max_tokens,
            sent_s=(timings.request_start or due) - due,
            token_s=times,
            error=self.info.error or unfinished,
            hit_tokens=self.cached_tokens or 0,
            num_tokens=self.output_tokens or 0,
        )


class _Requests(BaseModel):
    successful: list[_Request]
    errored: list[_Request]
    incomplete: list[_Request]


class _Distribution(BaseModel):
    percentiles: dict[str, float]


class _ByStatus(BaseModel):
    successful: _Distribution | None = None


class _Metrics(BaseModel):
    time_to_first_token_ms: _ByStatus
    inter_token_latency_ms: _ByStatus


class _Strategy(BaseModel):
    type_: str


class _Config(BaseModel):
    strategy: _Strategy


class _Benchmark(BaseModel):
    config: _Config
    requests: _Requests
    metrics: _Metrics


class _Report(BaseModel):
    benchmarks: list[_Benchmark]


def read(text: str) -> tuple[list[Sample], Mapping[str, float]]:
    """From a report of one benchmark. Raises RuntimeError when it is not as the pinned version writes it."""
    try:
        report = _Report.model_validate_json(text)
        (benchmark,) = report.benchmarks
    except (ValidationError, ValueError) as error:
        raise RuntimeError(f"guidellm's report cannot be read ({error}); install {PINS[0]}") from error
    follows = benchmark.config.strategy.type_ == "synchronous"  # sent when the one before has ended, never due
    found = benchmark.requests
    told = [(each, False) for each in found.successful] + [(each, True) for each in (*found.errored, *found.incomplete)]
    dues = [_due(each.info.timings, follows=follows) for each, _ in told]
    start = min(dues, default=0.0)
    samples = [each.sample(due, start, failed=failed) for (each, failed), due in zip(told, dues, strict=True)]
    metrics = benchmark.metrics
    distributions = {
        "TTFT": metrics.time_to_first_token_ms,
        "ITL": metrics.inter_token_latency_ms,
    }
    own = {
        f"{name} {share}": each.successful.percentiles[share]
        for name, each in distributions.items()
        if each.successful is not None
        for share in ("p50", "p99")
    }
    return sorted(samples, key=lambda sample: sample.due_s), own


def _due(timings: _Timings, *, follows: bool) -> float:
    """When the schedule wanted the request sent; 0 for one that never was."""
    return (None if follows else timings.targeted_start) or timings.request_start or 0.0

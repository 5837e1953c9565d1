"""The load of the serving benchmark, and the servers it goes to: what is asked, of whom, and what came back."""

from __future__ import annotations

import asyncio
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

import httpx
import uvicorn

from benchmarks import checkpoint, guidellm_driver
from benchmarks.arrivals import Workload
from benchmarks.client import Endpoint, Job, Sample
from benchmarks.latency import Slo
from benchmarks.neighbours import Neighbours
from benchmarks.report import ROOT, progress
from benchmarks.started_cluster import started_cluster
from benchmarks.vocabulary import Vocabulary, write_tokenizer
from cluster import config_file
from cluster.config import SluiceConfig
from deploy import offline
from deploy.api_service import ApiService
from deploy.openai_api import create_app

RECIPES: Mapping[str, str] = MappingProxyType(
    {"disaggregated": "cpu-disaggregated.yaml", "aggregated": "cpu-aggregated.yaml"}
)
_ALONE = 8  # requests, after as many that warm up
SLO = Slo(ttft_s=0.2, inter_token_s=0.015)
DRIVERS = ("own", "guidellm")
_MODEL = "benchmark"

Clear = Callable[[], Awaitable[object]]
Send = Callable[[Workload], Awaitable[tuple[list[Sample], Mapping[str, float]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked of each mode."""

    rates: Sequence[float] = (4.0, 8.0, 12.0)
    seconds: float = 5.0  # of arrivals at each rate
    num_rounds: int = 2
    num_alone: int = _ALONE
    prompt_tokens: tuple[int, int] = (64, 512)
    output_tokens: tuple[int, int] = (16, 64)
    slo: Slo = SLO
    seed: int = 0
    shape: checkpoint.Shape = checkpoint.SMALL
    vocab_size: int = checkpoint.SMALL.vocab_size

    def workload(self, rate: float, series: int, words: Mapping[int, str] | None = None) -> Workload:
        """Each series has prompts of its own; text made of `words` where they are given."""
        return Workload(
            rate=rate,
            num_requests=max(2, round(rate * self.seconds)) if rate else self.num_alone,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            vocab_size=self.vocab_size,
            seed=self.seed + series,
            words=words,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """One mode at one rate in one round. `said` are figures that the driver has computed itself, by its names."""

    samples: list[Sample]
    neighbours: float
    said: Mapping[str, float] = field(default_factory=dict)


# ---------------------------------------------------------------- one mode


def config_of(mode: str, directory: Path, shape: checkpoint.Shape) -> SluiceConfig:
    settings = {
        "model.path": str(checkpoint.write(directory, shape)),
        "model.load_format": "dummy",
        "model.served_name": _MODEL,
        "log.level": "warning",
    }
    return config_file.load(ROOT / "deploy" / "configs" / RECIPES[mode], settings=settings)


async def start_and_measure(mode: str, plan: Plan, round_: int) -> dict[float, Run]:
    """On worker processes that live for this."""
    found: dict[float, Run] = {}

    async def work(service: ApiService) -> None:
        async with front_door(service) as url:
            client = Endpoint(url, service.model.name)
            await warm_up(client, plan, round_)
            found.update(await measure(mode, partial(send, client), plan, round_, service.router.clear_cache))

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = config_of(mode, directory, plan.shape)
        await offline.run(config, directory, work, lambda line: None, with_tokenizer=False)
    return found


@asynccontextmanager
async def front_door(service: ApiService) -> AsyncIterator[str]:
    """The API on a port of its own, served by this loop."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(
            uvicorn.Config(create_app(service), log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        )
        serving = asyncio.create_task(server.serve([listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


# ---------------------------------------------------------------- one client


async def warm_up(endpoint: Endpoint, plan: Plan, round_: int, words: Mapping[int, str] | None = None) -> None:
    await send(endpoint, plan.workload(0, -1 - round_, words))


async def measure(
    name: str, send: Send, plan: Plan, series: int, clear: Clear, words: Mapping[int, str] | None = None
) -> dict[float, Run]:
    """Unloaded first, as rate 0, then each rate. Raises RuntimeError when even an unloaded request fails."""
    found: dict[float, Run] = {}
    for rate in (0.0, *plan.rates):
        await clear()
        others = Neighbours()
        samples, said = await send(plan.workload(rate, series, words))
        found[rate] = Run(samples, others.num_cores(), said)
        failures = [sample.error or "too few tokens" for sample in samples if not sample.complete]
        if failures and not rate:
            raise RuntimeError(f"{name}: {failures[0]}")
        load = f"{rate:g} requests/s" if rate else "alone"
        progress(f"serving: series {series + 1}, {name}, {load}: {len(samples)} requests, {len(failures)} failed")
    return found


async def send(endpoint: Endpoint, workload: Workload) -> tuple[list[Sample], Mapping[str, float]]:
    """Through our client, in a process of its own."""
    job = Job(endpoint.url, endpoint.model, workload, timeout_s=endpoint.timeout_s)
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.client",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        out, _ = await client.communicate(job.to_json().encode())
    finally:
        if client.returncode is None:
            client.kill()
    if client.returncode:
        raise RuntimeError(f"the client ended with exit status {client.returncode}")
    return Sample.list_from_json(out), {}


async def _no_clear() -> None: ...


async def measure_running(name: str, url: str, plan: Plan, round_: int) -> dict[float, Run]:
    async with httpx.AsyncClient(trust_env=False) as client:
        models = (await client.get(f"{url}/v1/models")).raise_for_status().json()
    endpoint = Endpoint(url, models["data"][0]["id"])
    await warm_up(endpoint, plan, round_)
    return await measure(name, partial(send, endpoint), plan, round_, _no_clear)


# ---------------------------------------------------------------- both clients, one after the other


def measure_public(mode: str, plan: Plan, round_: int, guidellm: Path) -> dict[str, dict[float, Run]]:
    """By driver, through the public port of a whole cluster that lives for this. Prompts are text, no two alike."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = config_of(mode, directory, plan.shape)
        config = config.model_copy(update={"http": config.http.model_copy(update={"port": 0})})
        write_tokenizer(directory, plan.shape.vocab_size)
        words = Vocabulary.read(directory).words
        with started_cluster(config, f"serving: {mode}") as url:
            return asyncio.run(_drive(mode, Endpoint(url, _MODEL), plan, round_, words, guidellm))


async def _drive(
    mode: str, endpoint: Endpoint, plan: Plan, round_: int, words: Mapping[int, str], guidellm: Path
) -> dict[str, dict[float, Run]]:
    """The driver that begins changes from round to round."""

    async def send_guidellm(workload: Workload) -> tuple[list[Sample], Mapping[str, float]]:
        with tempfile.TemporaryDirectory() as name:
            return await guidellm_driver.send(guidellm, endpoint, workload, Path(name))

    sends: Mapping[str, Send] = {"own": partial(send, endpoint), "guidellm": send_guidellm}
    await warm_up(endpoint, plan, round_, words)
    found: dict[str, dict[float, Run]] = {}
    for driver in DRIVERS[:: -1 if round_ % 2 else 1]:
        series = len(DRIVERS) * round_ + DRIVERS.index(driver)
        found[driver] = await measure(f"{mode}, {driver}", sends[driver], plan, series, _no_clear, words)
    return found

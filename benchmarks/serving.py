"""Serving over HTTP: Poisson arrivals on one prefill and one decode worker, beside two workers that do both.

    python -m benchmarks.serving [--rates 4 8 12] [--seconds 5] [--rounds 2] [--json FILE] [--plot FILE.png]
    python -m benchmarks.serving --url disaggregated=http://host:8000 --url aggregated=http://host:8001

Without --url each mode is started in turn from its recipe in deploy/configs, on equal resources: two worker
processes with one thread each. The front door is uvicorn in this process; the client is a process of its own. Modes
alternate, so that a noisy neighbour meets both; they get the same requests, routed by the same policy. Prompts are
random tokens and never begin alike, every run has new ones, and caches are cleared between runs, so that no cached
request stands beside a cold one: `hit` counts their tokens.

  alone     requests one after the other: the bound of every latency of its mode
  TTFT      from when a request was due to its first token
  ITL       inter-token latency, the mean of a request; `gap` is any single pause between two of its tokens
  e2e       from when a request was due to its last token
  goodput   requests/s completed within both objectives: TTFT (--slo-ttft-ms) and ITL (--slo-itl-ms)
  others    cores that other programs kept busy in the worst round (with --url the server is one of them): where it is
            over 0.1, the row says little

p99 is that of few requests: with fewer than 100 it is the slowest one. A running server (--url) is not cleared: the
seed is drawn anew there unless given, and --vocab-size must not exceed its model's.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import httpx
import uvicorn
from rich.table import Table

from benchmarks import checkpoint, latency_plot
from benchmarks.arrivals import Workload
from benchmarks.client import Job, Sample
from benchmarks.latency import Slo, Summary
from benchmarks.neighbours import Neighbours
from benchmarks.report import ROOT, Figure, Report, Setting, console, progress, sign
from cluster import config_file
from cluster.config import SluiceConfig
from deploy import offline
from deploy.api_service import ApiService
from deploy.openai_api import create_app

RECIPES: Mapping[str, str] = MappingProxyType(
    {"disaggregated": "cpu-disaggregated.yaml", "aggregated": "cpu-aggregated.yaml"}
)
PLOT = ROOT / "docs" / "images" / "serving.png"
_ALONE = 8  # requests, after as many that warm up
QUIET_CORES = 0.1  # of others; above it a figure says little
SLO = Slo(ttft_s=0.2, inter_token_s=0.015)
Clear = Callable[[], Awaitable[object]]


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

    def workload(self, rate: float, round_: int) -> Workload:
        return Workload(
            rate=rate,
            num_requests=max(2, round(rate * self.seconds)) if rate else self.num_alone,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            vocab_size=self.vocab_size,
            seed=self.seed + round_,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """One mode at one rate in one round."""

    samples: list[Sample]
    neighbours: float


# ---------------------------------------------------------------- one mode


def config_of(mode: str, directory: Path, shape: checkpoint.Shape) -> SluiceConfig:
    settings = {
        "model.path": str(checkpoint.write(directory, shape)),
        "model.load_format": "dummy",
        "model.served_name": "benchmark",
        "log.level": "warning",
    }
    return config_file.load(ROOT / "deploy" / "configs" / RECIPES[mode], settings=settings)


async def start_and_measure(mode: str, plan: Plan, round_: int) -> dict[float, Run]:
    """On worker processes that live for this."""
    found: dict[float, Run] = {}

    async def work(service: ApiService) -> None:
        async with front_door(service) as url:
            found.update(await measure(mode, url, service.model.name, plan, round_, service.router.clear_cache))

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


async def measure(mode: str, url: str, model: str, plan: Plan, round_: int, clear: Clear) -> dict[float, Run]:
    """Unloaded first, as rate 0, then each rate. Raises RuntimeError when even an unloaded request fails."""
    await send(Job(url, model, plan.workload(0, -1 - round_)))  # warms up
    found: dict[float, Run] = {}
    for rate in (0.0, *plan.rates):
        await clear()
        others = Neighbours()
        samples = await send(Job(url, model, plan.workload(rate, round_)))
        found[rate] = Run(samples, others.num_cores())
        failures = [sample.error or "too few tokens" for sample in samples if not sample.complete]
        if failures and not rate:
            raise RuntimeError(f"{mode}: {failures[0]}")
        load = f"{rate:g} requests/s" if rate else "alone"
        progress(f"serving: round {round_ + 1}, {mode}, {load}: {len(samples)} requests, {len(failures)} failed")
    return found


async def send(job: Job) -> list[Sample]:
    """Through a client in a process of its own."""
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
    return Sample.list_from_json(out)


async def measure_running(name: str, url: str, plan: Plan, round_: int) -> dict[float, Run]:
    async def no_clear() -> None: ...

    async with httpx.AsyncClient(trust_env=False) as client:
        models = (await client.get(f"{url}/v1/models")).raise_for_status().json()
    return await measure(name, url, models["data"][0]["id"], plan, round_, no_clear)


# ---------------------------------------------------------------- the report


def summarize(mode: str, rate: float, runs: Sequence[Run], slo: Slo) -> Summary:
    neighbours = max(run.neighbours for run in runs)
    return Summary.of(mode, rate, [run.samples for run in runs], slo, neighbours=neighbours)


def figures(summaries: Sequence[Summary]) -> list[Figure]:
    """Latencies against the same mode unloaded, goodput against what was offered."""
    alone = {summary.mode: summary for summary in summaries if not summary.rate}
    rows: list[Figure] = []
    for run in summaries:
        load = f"{run.mode}, {run.rate:g} requests/s" if run.rate else f"{run.mode}, alone"
        base = alone[run.mode]
        latencies = (
            ("TTFT p50", run.ttft_p50, base.ttft_p50),
            ("TTFT p99", run.ttft_p99, base.ttft_p50),
            ("ITL p50", run.inter_token_p50, base.inter_token_p50),
            ("ITL p99", run.inter_token_p99, base.inter_token_p50),
            ("gap p99", run.gap_p99, base.inter_token_p50),
            ("end to end p50", run.end_to_end_p50, base.end_to_end_p50),
            ("end to end p99", run.end_to_end_p99, base.end_to_end_p50),
        )
        rows += [Figure(f"{load}: {name}", 1e3 * s, "ms", 1e3 * least, True) for name, s, least in latencies]
        rows.append(Figure(f"{load}: output", run.tokens_per_s, "tok/s"))
        if run.rate:
            rows.append(Figure(f"{load}: goodput", run.goodput, "requests/s", run.rate))
    return rows


def table_of(report: Report, summaries: Sequence[Summary]) -> Table:
    table = Table(title=f"serving: {report.what}", title_justify="left")
    table.add_column("mode", no_wrap=True)
    for heading in ("req/s", "sent", "failed", "TTFT p50", "p99", "ITL p50", "p99", "gap p99", "e2e p50", "p99"):
        table.add_column(heading, justify="right")
    for heading in ("tok/s", "done/s", "goodput", "in SLO", "hit", "pulled", "others"):
        table.add_column(heading, justify="right")
    before = ""
    for run in summaries:
        if before not in ("", run.mode):
            table.add_section()
        before = run.mode
        latencies = (
            run.ttft_p50,
            run.ttft_p99,
            run.inter_token_p50,
            run.inter_token_p99,
            run.gap_p99,
            run.end_to_end_p50,
            run.end_to_end_p99,
        )
        table.add_row(
            run.mode,
            f"{run.rate:g}" if run.rate else "alone",
            str(run.num_requests),
            str(run.num_failed),
            *(f"{1e3 * seconds:.1f}" if seconds < 1 else f"{1e3 * seconds:.0f}" for seconds in latencies),
            f"{run.tokens_per_s:.0f}",
            f"{run.requests_per_s:.2f}",
            f"{run.goodput:.2f}" if run.rate else "",
            f"{100 * run.num_good / run.num_requests:.0f} %",
            str(run.hit_tokens),
            str(run.pulled_blocks),
            f"{run.neighbours:.1f}",
        )
    return table


def report_of(summaries: Sequence[Summary], plan: Plan, setting: Setting, served: str) -> Report:
    slo = f"TTFT ≤ {1e3 * plan.slo.ttft_s:g} ms and ITL ≤ {1e3 * plan.slo.inter_token_s:g} ms"
    (low, high), (least, most) = plan.prompt_tokens, plan.output_tokens
    lengths = f"prompts {low}-{high}, answers {least}-{most} tokens"
    return Report(
        benchmark="serving",
        what=f"{served}; {lengths}; goodput: {slo}",
        arguments=asdict(plan),
        figures=figures(summaries),
        setting=setting,
        details={"runs": [asdict(summary) for summary in summaries]},
    )


def run(
    plan: Plan, modes: Sequence[str] = tuple(RECIPES), urls: Mapping[str, str] | None = None
) -> tuple[Report, list[Summary]]:
    setting = Setting.here()
    targets = urls or dict.fromkeys(modes, "")
    rounds: dict[str, list[dict[float, Run]]] = {mode: [] for mode in targets}
    for round_ in range(plan.num_rounds):
        for mode, url in targets.items():
            measuring = measure_running(mode, url, plan, round_) if url else start_and_measure(mode, plan, round_)
            rounds[mode].append(asyncio.run(measuring))
    found = [
        summarize(mode, rate, [runs[rate] for runs in rounds[mode]], plan.slo)
        for mode in targets
        for rate in (0.0, *plan.rates)
    ]
    served = "running servers" if urls else f"{plan.shape}, two workers of one thread"
    return report_of(found, plan, setting, served), found


def draw(path: Path, report: Report, summaries: Sequence[Summary], plan: Plan) -> None:
    what = report.what.partition(";")[0]
    neighbours = max(summary.neighbours for summary in summaries)
    noise = f"; other programs kept {neighbours:.1f} cores busy" if neighbours > QUIET_CORES else ""
    latency_plot.draw(
        path,
        summaries,
        plan.slo,
        title=" and ".join(dict.fromkeys(summary.mode for summary in summaries)),
        footer=f"{report.setting.hardware}; {what}; Poisson arrivals over HTTP; commit {report.setting.commit}{noise}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plan = Plan()
    parser.add_argument("--rates", type=float, nargs="+", default=list(plan.rates), help="requests/s")
    parser.add_argument("--seconds", type=float, default=plan.seconds, help="of arrivals at each rate")
    parser.add_argument("--rounds", type=int, default=plan.num_rounds)
    parser.add_argument("--prompt", type=int, nargs=2, default=plan.prompt_tokens, metavar=("LOW", "HIGH"))
    parser.add_argument("--output", type=int, nargs=2, default=plan.output_tokens, metavar=("LOW", "HIGH"))
    parser.add_argument("--slo-ttft-ms", type=float, default=1e3 * plan.slo.ttft_s)
    parser.add_argument("--slo-itl-ms", type=float, default=1e3 * plan.slo.inter_token_s, help="mean of a request")
    parser.add_argument("--seed", type=int, help="0, with --url the time")
    parser.add_argument("--modes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="measure a running server")
    parser.add_argument("--vocab-size", type=int, default=256, help="with --url: prompts draw from tokens below it")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--plot", type=Path, default=PLOT, help="PNG; default docs/images/serving.png, not with --url")
    options = parser.parse_args()
    urls = dict(pair.partition("=")[::2] for pair in options.url)
    if any(not url.startswith("http://") for url in urls.values()):
        parser.error("--url is written NAME=http://host:port")
    plan = Plan(
        rates=options.rates,
        seconds=options.seconds,
        num_rounds=options.rounds,
        prompt_tokens=tuple(options.prompt),
        output_tokens=tuple(options.output),
        slo=Slo(options.slo_ttft_ms / 1e3, options.slo_itl_ms / 1e3),
        seed=(time.time_ns() if urls else 0) if options.seed is None else options.seed,
        vocab_size=options.vocab_size if urls else plan.vocab_size,
    )
    report, summaries = run(plan, options.modes, urls)
    screen = console()
    screen.print(table_of(report, summaries))
    sign(screen, report.setting)
    if options.json:
        report.write(options.json)
    if not urls or options.plot != PLOT:
        draw(options.plot, report, summaries, plan)
        print(f"picture: {options.plot}")


if __name__ == "__main__":
    main()

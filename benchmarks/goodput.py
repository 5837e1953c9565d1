"""Goodput of one prefill and one decode worker beside the same two as workers of both roles: Ray, HTTP, one router.

    python -m benchmarks.goodput --shape tiny|v2-lite|v2-lite-fp8|qwen3-8b [--rates 4 8 …] [--budgets 256 512 …]
                                 [--seconds 5] [--slo-ttft-ms 1000] [--slo-itl-ms 10] [--limit-s 440]
                                 [--gpus 0.5] [--json FILE] [--plot FILE.png]

`tiny` runs on a CPU, and its figures mean nothing; the others want two GPUs. Weights are random, and so are the experts
that they choose: some more than others, in both modes alike. Prompts are token ids: short chats and, for
`--long-share` of the requests, long documents, as a Poisson process; the seed fixes lengths, tokens and times, and
every app gets the same requests through its public port.

The aggregated mode is measured at each budget (scheduler.max_batched_tokens, and as large a chunk): what stands beside
the disaggregated one is its best budget at that rate. A request is good when its first token came within --slo-ttft-ms
of when it was due and the 99th percentile of its pauses between tokens is within --slo-itl-ms.

  goodput     good requests/s; of a mode also the most over all rates
  ITL p99     of all pauses between two tokens of a stream, as they arrive
  added TTFT  prompts of one length, one by one, each by an engine in process and then through the public port of the
              disaggregated app: median of the differences, in turns as machines change their pace within seconds

Apps start side by side and are measured in turn; those that wait have nothing to compute. An app that can no longer
keep up is not asked for higher rates, and after --limit-s nothing more is begun: the report names what was left out.
With one card, `--gpus 0.5 --apps-at-once 1 --limit-s 0` finds what is added to the first token, and nothing else: the
worker that waits has nothing to compute, so the other one has the card for itself.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks import goodput_plot
from benchmarks.arrivals import Workload
from benchmarks.client import Endpoint, Sample, ask
from benchmarks.goodput_scenario import DISAGGREGATED, MODEL, PREFILL_POOL, App, Objectives, Scenario, scenarios
from benchmarks.latency import Summary
from benchmarks.load import send
from benchmarks.lone_engine import first_tokens
from benchmarks.neighbours import Neighbours
from benchmarks.process import process, receive
from benchmarks.report import Figure, Report, Setting, percentile, progress, publish
from benchmarks.started_cluster import started_cluster

GOODPUT_RATIO, ITL_RATIO, ADDED_MS = 1.3, 0.5, 5.0  # what is wanted
_REQUEST_S = 30.0
_HOPELESS = 0.1  # share of good requests at which higher rates are not tried
_BEHIND = 2.0  # so many times the span of the arrivals until the last token: the same


@dataclass(slots=True)
class Found:
    """Of one app. `by_rate`: those that were measured, lowest first."""

    app: App
    alone: list[Sample] = field(default_factory=list)
    by_rate: dict[float, Summary] = field(default_factory=dict)
    left_out: list[float] = field(default_factory=list)


class Sweep:
    """Belongs to one run of a scenario. Apps of one group are up together. `lone` is asked beside the disaggregated
    app, and ends then: `lone_s` are its seconds to the first token, in the order of that app's `alone`."""

    def __init__(self, scenario: Scenario, limit_s: float, lone: Connection) -> None:
        self._scenario = scenario
        self._ends = time.monotonic() + limit_s
        self._lone = lone
        self.lone_s: list[float] = []

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._ends

    def measure(self, apps: Sequence[App]) -> list[Found]:
        """Raises what the first of them raised; then all of them are taken down."""
        started, measured = threading.Barrier(len(apps)), threading.Barrier(len(apps))
        turn = threading.Lock()

        def one(app: App) -> Found:
            try:
                with started_cluster(app.config, app.label) as url:
                    started.wait()
                    with turn:
                        found = asyncio.run(self._measure(app, Endpoint(url, MODEL, timeout_s=_REQUEST_S)))
                    measured.wait()
                    return found
            except BaseException:
                started.abort()
                measured.abort()
                raise

        with ThreadPoolExecutor(len(apps)) as threads:
            running = [threads.submit(one, app) for app in apps]
        errors = [error for each in running if (error := each.exception()) is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        return [each.result() for each in running]

    async def _measure(self, app: App, endpoint: Endpoint) -> Found:
        scenario, found = self._scenario, Found(app)
        # At the highest rate: steps of all sizes, so that no app compiles for those behind it.
        await send(endpoint, scenario.workload(scenario.rates[-1], series=1))
        if app.budget is None:
            pairs = await one_by_one(self._lone, endpoint, scenario.alone())
            self.lone_s, found.alone = [engine_s for engine_s, _ in pairs], [sample for _, sample in pairs]
        else:
            found.alone, _ = await send(endpoint, scenario.alone())
        _check(app, found.alone)
        hopeless = False
        for rate in scenario.rates:
            if hopeless or self.is_over:
                found.left_out.append(rate)
                continue
            others = Neighbours()
            samples, _ = await send(endpoint, scenario.workload(rate))
            run = Summary.of(app.label, rate, [samples], scenario.objectives, neighbours=others.num_cores())
            found.by_rate[rate] = run
            hopeless = run.num_good < _HOPELESS * run.num_requests or run.elapsed > _BEHIND * scenario.seconds
            progress(
                f"{app.label}, {rate:g} requests/s: {run.num_requests} in {run.elapsed:.1f} s, {run.num_failed} "
                f"failed, {run.num_good} good; TTFT p50 {1e3 * run.ttft_p50:.0f} ms, p99 {1e3 * run.ttft_p99:.0f} ms; "
                f"ITL p50 {1e3 * run.inter_token_p50:.2f} ms, p99 {1e3 * run.gap_p99:.2f} ms"
            )
        return found


def _check(app: App, samples: Sequence[Sample]) -> None:
    """Raises RuntimeError: nothing failed, nothing was cached, and the stages ran where they should."""
    wanted = DISAGGREGATED if app.budget is None else "aggregated"
    for sample in samples:
        if not sample.complete:
            raise RuntimeError(f"{app.label}: {sample.error or 'too few tokens'}")
        if sample.hit_tokens:
            raise RuntimeError(f"{app.label}: {sample.hit_tokens} tokens of a new prompt were cached")
        if sample.plan != wanted:
            raise RuntimeError(f"{app.label}: a request was {sample.plan}")


async def one_by_one(lone: Connection, endpoint: Endpoint, workload: Workload) -> list[tuple[float, Sample]]:
    """Seconds to the first token of the lone engine, which ends then, and the same prompt's at the port."""
    pairs: list[tuple[float, Sample]] = []
    for arrival in workload.arrivals():
        lone.send((arrival.prompt, arrival.num_tokens))
        first_s, hit_tokens = receive(lone)  # this loop has nothing else to do
        assert not hit_tokens
        sample = Sample(0.0, len(arrival.prompt), arrival.num_tokens)
        await ask(endpoint, arrival, time.perf_counter(), sample)
        pairs.append((first_s, sample))
    lone.send(None)
    return pairs


def _warm_up(values: Sequence[object]) -> int:
    """How many of them do not count."""
    return len(values) // 4


# ---------------------------------------------------------------- the report


def best_of(founds: Sequence[Found], rate: float) -> Summary | None:
    """The aggregated mode at its best budget for that rate."""
    runs = [found.by_rate[rate] for found in founds if found.app.budget is not None and rate in found.by_rate]
    return max(runs, key=lambda run: (run.goodput, -run.gap_p99), default=None)


def figures(scenario: Scenario, founds: Sequence[Found], lone_s: Sequence[float]) -> list[Figure]:
    """Ratios have what is wanted as their bound."""
    own = next(found for found in founds if found.app.budget is None)
    alone, lone_s = own.alone[_warm_up(own.alone) :], lone_s[_warm_up(lone_s) :]
    lone = 1e3 * percentile(lone_s, 0.5)
    public, computed = [sample.token_s[0] for sample in alone], [sample.computed_s for sample in alone]
    added, beyond = (
        1e3 * percentile([value - engine_s for value, engine_s in zip(values, lone_s, strict=True)], 0.5)
        for values in (public, computed)
    )
    note = f"prompts of {scenario.lone_prompt_tokens} token ids, one by one"
    rows = [
        Figure("added TTFT, p50", added, "ms", ADDED_MS, True, f"wanted: {ADDED_MS:g} ms; {note}"),
        Figure("of that, in the worker that computes", beyond, "ms"),
        Figure("TTFT of the lone engine, p50", lone, "ms"),
        Figure("TTFT at the public port, p50", 1e3 * percentile(public, 0.5), "ms", lone, True),
    ]
    most: dict[str, tuple[float, str]] = {"disaggregated": (0.0, ""), "aggregated": (0.0, "")}
    for rate in scenario.rates:
        pair = {"disaggregated": own.by_rate.get(rate), "aggregated": best_of(founds, rate)}
        for mode, run in pair.items():
            if run is None:
                continue
            name, told = f"{mode}, {rate:g} requests/s", run.mode if mode == "aggregated" else ""
            most[mode] = max(most[mode], (run.goodput, f"{run.mode} at {rate:g} requests/s"))
            rows += [
                Figure(f"{name}: goodput", run.goodput, "requests/s", rate, note=told),
                Figure(f"{name}: TTFT p99", 1e3 * run.ttft_p99, "ms", 1e3 * scenario.objectives.ttft_s, True),
                Figure(f"{name}: ITL p99", 1e3 * run.gap_p99, "ms", 1e3 * scenario.objectives.inter_token_s, True),
            ]
        here, there = pair["disaggregated"], pair["aggregated"]
        if here is not None and there is not None and there.gap_p99:
            ratio = here.gap_p99 / there.gap_p99
            rows.append(Figure(f"{rate:g} requests/s: ITL p99, ratio", ratio, "", ITL_RATIO, True, "wanted: 0.5"))
    for mode, (value, told) in most.items():
        if told:
            rows.append(Figure(f"{mode}: most goodput", value, "requests/s", note=told))
    base = most["aggregated"][0]
    if base:
        ratio = most["disaggregated"][0] / base
        rows.append(Figure("goodput, ratio", ratio, "", GOODPUT_RATIO, note=f"wanted: {GOODPUT_RATIO:g}"))
    return rows


def report_of(scenario: Scenario, founds: Sequence[Found], lone_s: Sequence[float], setting: Setting) -> Report:
    (low, high), (least, most), slo = scenario.chat_tokens, scenario.long_tokens, scenario.objectives
    return Report(
        benchmark="goodput",
        what=(
            f"{scenario.name}, two workers, {_hardware(scenario)}; chats of {low}-{high} tokens, "
            f"{scenario.long_share:.0%} of {least}-{most}; TTFT ≤ {1e3 * slo.ttft_s:g} ms, ITL p99 ≤ "
            f"{1e3 * slo.inter_token_s:g} ms"
        ),
        arguments={
            "shape": scenario.name,
            "rates": scenario.rates,
            "budgets": scenario.budgets,
            "seconds": scenario.seconds,
            "output_tokens": scenario.output_tokens,
            "largest_step": scenario.largest_step,
            "chunk_tokens": scenario.chunk_tokens,
            "transport": scenario.transport,
            "gpus": scenario.gpus,
            "objectives": asdict(slo),
            "seed": scenario.seed,
        },
        figures=figures(scenario, founds, lone_s),
        setting=setting,
        details={
            "runs": [asdict(run) for found in founds for run in found.by_rate.values()],
            "left_out": {found.app.label: found.left_out for found in founds if found.left_out},
            "not_started": [budget for budget in scenario.budgets if budget not in {f.app.budget for f in founds}],
            "alone_s": {found.app.label: [sample.token_s[0] for sample in found.alone] for found in founds},
            "lone_engine_s": list(lone_s),
        },
    )


def _hardware(scenario: Scenario) -> str:
    if scenario.settings["engine.device"] == "cpu":
        return "CPU"
    import torch

    return torch.cuda.get_device_name()


def run(scenario: Scenario, limit_s: float, json_path: Path | None = None, plot: Path | None = None) -> Report:
    """Writes what there is after each group of apps."""
    setting, founds, report = Setting.here(), list[Found](), None
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        apps = scenario.apps(directory)
        lone = stack.enter_context(process(first_tokens, scenario.lone(apps[0]), PREFILL_POOL))
        assert receive(lone) == "ready"
        sweep = Sweep(scenario, limit_s, lone)
        for begin in range(0, len(apps), scenario.apps_at_once):
            if sweep.is_over and report is not None:
                break
            founds += sweep.measure(apps[begin : begin + scenario.apps_at_once])
            report = report_of(scenario, founds, sweep.lone_s, setting)
            if json_path is not None:
                report.write(json_path)
            if plot is not None:
                runs = [run for found in founds for run in found.by_rate.values()]
                goodput_plot.draw(plot, runs, scenario.objectives, title=report.what, setting=setting)
    assert report is not None
    return report


def main() -> None:
    known = scenarios()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=known, required=True)
    parser.add_argument("--rates", type=float, nargs="+", help="requests/s, lowest first")
    parser.add_argument("--budgets", type=int, nargs="+", help="tokens of a step of the aggregated mode")
    parser.add_argument("--seconds", type=float, help="of arrivals at each rate")
    parser.add_argument("--long-share", type=float, help="of the requests")
    parser.add_argument("--slo-ttft-ms", type=float)
    parser.add_argument("--slo-itl-ms", type=float, help="99th percentile of a request")
    parser.add_argument("--apps-at-once", type=int, help="that the memory of the GPUs holds")
    parser.add_argument("--transport", choices=("auto", "nixl", "ipc"))
    parser.add_argument("--gpus", type=float, help="of each worker: 0.5 puts both of a mode on one card")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--limit-s", type=float, default=440.0, help="nothing is begun later than this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    scenario = known[options.shape]
    slo = scenario.objectives
    given = {
        "rates": options.rates and tuple(options.rates),
        "budgets": options.budgets and tuple(options.budgets),
        "seconds": options.seconds,
        "long_share": options.long_share,
        "apps_at_once": options.apps_at_once,
        "transport": options.transport,
        "gpus": options.gpus,
        "seed": options.seed,
        "objectives": Objectives(
            slo.ttft_s if options.slo_ttft_ms is None else options.slo_ttft_ms / 1e3,
            slo.inter_token_s if options.slo_itl_ms is None else options.slo_itl_ms / 1e3,
        ),
    }
    scenario = replace(scenario, **{name: value for name, value in given.items() if value is not None})
    publish(run(scenario, options.limit_s, options.json, options.plot), options.json)


if __name__ == "__main__":
    main()

"""Serving over HTTP: Poisson arrivals on one prefill and one decode worker, beside two workers that do both.

    python -m benchmarks.serving [--rates 4 8 12] [--seconds 5] [--rounds 2] [--json FILE] [--plot FILE.png]
    python -m benchmarks.serving --driver guidellm [--rates 4 8 12] …
    python -m benchmarks.serving --url disaggregated=http://host:8000 --url aggregated=http://host:8001

Without --url each mode is started in turn from its recipe in deploy/configs, on equal resources: two worker
processes with one thread each. The front door is uvicorn in this process; the client is a process of its own. Modes
alternate, so that a noisy neighbour meets both; they get the same requests, routed by the same policy. Prompts are
random tokens and never begin alike, every run has new ones, and caches are cleared between runs, so that no cached
request stands beside a cold one: `hit` counts their tokens.

With --driver guidellm each mode is a whole cluster (Ray Serve, HAProxy) and gets text through its public port, from
guidellm, as it is published, and from our client, one after the other. Both have prompts of their own from the same
distribution, as caches are not cleared there. Both are counted alike; what guidellm itself says, which counts from
when it sent a request, stands in the report's details. It keeps no time of each token: no gaps, and no route.

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
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from benchmarks import guidellm_driver, latency_plot
from benchmarks.latency import Slo, Summary
from benchmarks.load import (
    DRIVERS,
    RECIPES,
    Plan,
    Run,
    measure_public,
    measure_running,
    start_and_measure,
)
from benchmarks.report import ROOT, Figure, Report, Setting, console, sign

PLOT = ROOT / "docs" / "images" / "serving.png"
PLOT_GUIDELLM = PLOT.with_name("serving-guidellm.png")
QUIET_CORES = 0.1  # of others; above it a figure says little


# ---------------------------------------------------------------- the report


def summarize(mode: str, driver: str, rate: float, runs: Sequence[Run], slo: Slo) -> Summary:
    neighbours = max(run.neighbours for run in runs)
    return Summary.of(mode, rate, [run.samples for run in runs], slo, neighbours=neighbours, driver=driver)


def figures(summaries: Sequence[Summary]) -> list[Figure]:
    """Latencies against the same mode unloaded, goodput against what was offered."""
    alone = {summary.label: summary for summary in summaries if not summary.rate}
    rows: list[Figure] = []
    for run in summaries:
        load = f"{run.label}, {run.rate:g} requests/s" if run.rate else f"{run.label}, alone"
        base = alone[run.label]
        latencies = (
            ("TTFT p50", run.ttft_p50, base.ttft_p50),
            ("TTFT p99", run.ttft_p99, base.ttft_p50),
            ("ITL p50", run.inter_token_p50, base.inter_token_p50),
            ("ITL p99", run.inter_token_p99, base.inter_token_p50),
            ("gap p99", run.gap_p99, base.inter_token_p50),
            ("end to end p50", run.end_to_end_p50, base.end_to_end_p50),
            ("end to end p99", run.end_to_end_p99, base.end_to_end_p50),
        )
        rows += [
            Figure(f"{load}: {name}", 1e3 * s, "ms", 1e3 * least, True)
            for name, s, least in latencies
            if s or name != "gap p99"
        ]
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
        if before not in ("", run.label):
            table.add_section()
        before = run.label
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
            run.label,
            f"{run.rate:g}" if run.rate else "alone",
            str(run.num_requests),
            str(run.num_failed),
            *(f"{1e3 * seconds:.{0 if seconds >= 1 else 1}f}" if seconds else "" for seconds in latencies),
            f"{run.tokens_per_s:.0f}",
            f"{run.requests_per_s:.2f}",
            f"{run.goodput:.2f}" if run.rate else "",
            f"{100 * run.num_good / run.num_requests:.0f} %",
            str(run.hit_tokens),
            str(run.pulled_blocks),
            f"{run.neighbours:.1f}",
        )
    return table


def report_of(
    summaries: Sequence[Summary], plan: Plan, setting: Setting, served: str, details: Mapping[str, object]
) -> Report:
    slo = f"TTFT ≤ {1e3 * plan.slo.ttft_s:g} ms and ITL ≤ {1e3 * plan.slo.inter_token_s:g} ms"
    (low, high), (least, most) = plan.prompt_tokens, plan.output_tokens
    lengths = f"prompts {low}-{high}, answers {least}-{most} tokens"
    return Report(
        benchmark="serving-guidellm" if details else "serving",
        what=f"{served}; {lengths}; goodput: {slo}",
        arguments=asdict(plan),
        figures=figures(summaries),
        setting=setting,
        details={"runs": [asdict(summary) for summary in summaries], **details},
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
        summarize(mode, "", rate, [runs[rate] for runs in rounds[mode]], plan.slo)
        for mode in targets
        for rate in (0.0, *plan.rates)
    ]
    served = "running servers" if urls else f"{plan.shape}, two workers of one thread"
    return report_of(found, plan, setting, served, {}), found


def run_guidellm(plan: Plan, modes: Sequence[str] = tuple(RECIPES)) -> tuple[Report, list[Summary]]:
    """guidellm and our client, one after the other, against the public port of one cluster for each mode and round."""
    setting, guidellm = Setting.here(), guidellm_driver.ensure()
    rounds = [
        {mode: measure_public(mode, plan, round_, guidellm) for mode in modes} for round_ in range(plan.num_rounds)
    ]
    found = [
        summarize(mode, driver, rate, [by_mode[mode][driver][rate] for by_mode in rounds], plan.slo)
        for mode in modes
        for driver in DRIVERS
        for rate in (0.0, *plan.rates)
    ]
    said = [
        {"mode": mode, "rate": rate, "round": number, **by_mode[mode]["guidellm"][rate].said}
        for number, by_mode in enumerate(rounds)
        for mode in modes
        for rate in (0.0, *plan.rates)
    ]
    served = f"{plan.shape}, two workers of one thread, Ray Serve and HAProxy; {guidellm_driver.PINS[0]}"
    return report_of(found, plan, setting, served, {"guidellm_says_ms": said}), found


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
    parser.add_argument(
        "--driver", choices=DRIVERS, default="own", help="guidellm: installed first, and ours beside it"
    )
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="measure a running server")
    parser.add_argument("--vocab-size", type=int, default=256, help="with --url: prompts draw from tokens below it")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--plot", type=Path, help="PNG; default docs/images/serving*.png, none with --url")
    options = parser.parse_args()
    urls = dict(pair.partition("=")[::2] for pair in options.url)
    if any(not url.startswith("http://") for url in urls.values()):
        parser.error("--url is written NAME=http://host:port")
    if urls and options.driver == "guidellm":
        parser.error("--driver guidellm starts its own clusters, whose tokenizer it knows; leave --url out")
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
    if options.driver == "guidellm":
        report, summaries = run_guidellm(plan, options.modes)
    else:
        report, summaries = run(plan, options.modes, urls)
    screen = console()
    screen.print(table_of(report, summaries))
    sign(screen, report.setting)
    if options.json:
        report.write(options.json)
    usual = PLOT_GUIDELLM if options.driver == "guidellm" else PLOT
    plot = options.plot or (None if urls else usual)
    if plot is not None:
        draw(plot, report, summaries, plan)
        print(f"picture: {plot}")


if __name__ == "__main__":
    main()

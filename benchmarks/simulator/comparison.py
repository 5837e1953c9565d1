"""What a policy is worth: one trace at several speeds, under each policy, on 8 prefill and 8 decode workers.

    python -m benchmarks.simulator compare [--trace FILE [--trace-block 512]] [--speeds 1 2 3] [--policies kv_aware …]
                                           [--machine h200-8b|FILE] [--plot FILE] [--json FILE]

Without a trace: conversations of a seed, see docs/simulator.md. A speed of 2 sends the same requests in half the time.
What arrives in the first fifth of a run warms the caches and is not counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.report import Figure, Report, Setting, progress, publish
from benchmarks.simulator.cluster import Setup, simulate
from benchmarks.simulator.comparison_plot import draw
from benchmarks.simulator.outcome import Objective, Outcome
from benchmarks.simulator.step_cost import COSTS, StepCost
from benchmarks.simulator.trace import TRACE_BLOCK, TraceRequest, faster, read
from benchmarks.simulator.traffic import Conversations
from cluster.config import RouterConfig

POLICIES = ("kv_aware", "least_loaded", "round_robin")
SPEEDS = (3.0, 6.0, 9.0, 12.0)
WARM_SHARE = 0.2
OBJECTIVE = Objective(ttft_s=1.0, gap_s=0.025)
CHAT = Conversations(
    sessions_per_s=5,
    span_s=160,
    seed=0,
    num_beginnings=200,
    beginning_tokens=6000,
    question_tokens=500,
    answer_tokens=150,
    pause_s=60,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, help="JSON lines; none: conversations of seed 0")
    parser.add_argument("--trace-block", type=int, default=TRACE_BLOCK, help="tokens that a hash id stands for")
    parser.add_argument("--span", type=float, default=CHAT.span_s, help="seconds of the generated trace")
    parser.add_argument("--speeds", type=float, nargs="+", default=list(SPEEDS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument(
        "--machine", default="h200-8b", help=f"{', '.join(COSTS)}, or a JSON file with the fields of StepCost"
    )
    parser.add_argument("--blocks", type=int, default=10_000, help="of KV, a worker")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)


def run(options: argparse.Namespace) -> None:
    started, setting = time.monotonic(), Setting.here()
    trace = read(options.trace, options.trace_block) if options.trace else _chat(options.span)
    cost = COSTS[options.machine] if options.machine in COSTS else StepCost.load(Path(options.machine))
    setup = Setup(cost=cost, num_blocks=options.blocks, trace_block=options.trace_block)
    outcomes = compare(setup, trace, options.speeds, options.policies, OBJECTIVE)
    name = options.trace.name if options.trace else f"conversations of {options.span:g} s"
    arguments = {"trace": name, "machine": options.machine, "blocks": options.blocks, "speeds": options.speeds}
    what = f"policies on {name}, {len(trace)} requests, 8 prefill and 8 decode workers, in virtual time"
    details = {"outcomes": [asdict(each) for each in outcomes], "objective": asdict(OBJECTIVE)}
    progress(f"{time.monotonic() - started:.0f} s")
    publish(Report("simulator", what, arguments, _figures(outcomes), setting, details), options.json)
    if options.plot:
        footer = f"{what}; {options.machine}, {options.blocks} blocks a worker; commit {setting.commit}"
        draw(options.plot, outcomes, OBJECTIVE, title="Where a request goes, and what it is worth", footer=footer)


def compare(
    setup: Setup,
    trace: Sequence[TraceRequest],
    speeds: Sequence[float],
    policies: Sequence[str],
    objective: Objective,
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for speed in speeds:
        faster_trace = faster(trace, speed)
        span_s = faster_trace[-1].at_ms / 1000
        for policy in policies:
            router = RouterConfig.model_validate({**setup.router.model_dump(), "policy": policy})
            records = simulate(setup.with_router(router), faster_trace)
            outcome = Outcome.of(policy, records, objective, from_s=WARM_SHARE * span_s, to_s=span_s)
            progress(f"{outcome.rate:.1f} requests/s, {policy}: hit rate {outcome.hit_rate:.2f}")
            outcomes.append(outcome)
    return outcomes


def _chat(span_s: float) -> list[TraceRequest]:
    return CHAT.lasting(span_s).requests()


def _figures(outcomes: Sequence[Outcome]) -> list[Figure]:
    figures: list[Figure] = []
    for each in outcomes:
        of = f"{each.policy}, {each.rate:.0f}/s"
        figures += [
            Figure(f"hit rate, {of}", each.hit_rate, "", note=f"{each.fetch_rate:.2f} more were fetched"),
            Figure(f"TTFT p50, {of}", 1e3 * each.ttft_p50, "ms", note=f"p99 {1e3 * each.ttft_p99:.0f}"),
            Figure(
                f"goodput, {of}",
                each.goodput,
                "/s",
                each.rate,
                note=f"gap p99 {1e3 * each.gap_p99:.1f} ms, {each.num_refused} refused; bound: what arrived",
            ),
        ]
    return figures

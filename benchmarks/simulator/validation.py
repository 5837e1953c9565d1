"""The simulator against a real cluster of this machine, on one trace.

    python -m benchmarks.simulator validate [--span 40] [--sessions-per-s 1] [--policies …] [--json FILE]

Two prefill and two decode workers as plain processes over gRPC and NIXL, a Llama of 6 M parameters in fp32 with random
weights, the router in this process. First the costs are measured: of steps in this process alone (benchmarks/simulator/
calibration.py), of words, reads and what a worker does between two steps by short requests through the idle cluster,
one after the other. Then the trace is sent to the cluster, and run in virtual time with these costs. The workers share
the cores of this machine with each other, with neighbours and with the router in this process: how many cores those
keep busy is counted in processor time while the trace runs. What is compared was not used to find any of it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks import checkpoint
from benchmarks.neighbours import Neighbours
from benchmarks.report import Figure, Report, Setting, progress, publish
from benchmarks.simulator import calibration
from benchmarks.simulator.cluster import Record, Setup, simulate
from benchmarks.simulator.comparison import POLICIES
from benchmarks.simulator.outcome import Objective, Outcome
from benchmarks.simulator.step_cost import StepCost
from benchmarks.simulator.trace import TraceRequest
from benchmarks.simulator.traffic import Conversations
from cluster.config import KvConfig, Role, RouterConfig
from cluster.request import SamplingParams
from tests.support.plain_cluster import PlainCluster, plain_cluster
from workers.engine.scheduler import SchedulerLimits

BLOCK = 16
NUM_BLOCKS = 400
VOCAB = checkpoint.SMALL.vocab_size
LIMITS = SchedulerLimits(
    max_batched_tokens=2048,
    max_sequences=64,
    max_model_len=checkpoint.SMALL.max_position_embeddings,
    prefill_reserve=KvConfig().prefill_reserve,
    chunk_tokens=512,
)
CHAT = Conversations(
    sessions_per_s=1,
    span_s=40,
    seed=5,
    num_beginnings=8,
    beginning_tokens=300,
    question_tokens=60,
    answer_tokens=20,
    pause_s=3,
    max_tokens=1200,
    trace_block=BLOCK,
)
OBJECTIVE = Objective(ttft_s=0.5, gap_s=0.1)
_NUM_SHORT = 30
_FRAMES = 4  # before the first token: submit, ask, ticket, tokens
_READ_BLOCKS = 40
_NUM_TOKENS = 10
_NUM_CORES = os.cpu_count() or 1


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--span", type=float, default=CHAT.span_s, help="seconds of the trace")
    parser.add_argument("--sessions-per-s", type=float, default=CHAT.sessions_per_s)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=["kv_aware", "round_robin"])
    parser.add_argument("--json", type=Path)


def run(options: argparse.Namespace) -> None:
    setting = Setting.here()
    trace = replace(CHAT, sessions_per_s=options.sessions_per_s).lasting(options.span).requests()
    figures: list[Figure] = []
    details: dict[str, object] = {}
    neighbours = Neighbours()
    with tempfile.TemporaryDirectory() as name:
        folder = checkpoint.write(Path(name))
        progress("steps …")
        steps = calibration.measure(folder, BLOCK)
        coefficients, error = steps.fit()
        figures.append(Figure("error of a step, median", 100 * error, "%", note="of the fit to the measured steps"))
        for policy in options.policies:
            progress(f"{policy} …")
            cost, idle_s, num_others, real = asyncio.run(
                _serve(folder, policy, steps.block_bytes, list(coefficients), trace)
            )
            simulated = simulate(replace(_setup(cost, policy), num_cores=_NUM_CORES, num_others=num_others), trace)
            details[policy] = {"cost": asdict(cost), "num_others": num_others}
            figures.append(Figure(f"cores that others kept busy, {policy}", num_others, "", note=f"of {_NUM_CORES}"))
            figures.append(_alone(policy, cost, idle_s))
            figures += _compared(policy, real, simulated)
    foreign = f"neighbours kept {neighbours.num_cores():.1f} cores"
    what = f"the simulator against 2 + 2 real workers, {len(trace)} requests; {foreign}"
    arguments = {"span": options.span, "sessions_per_s": options.sessions_per_s}
    publish(Report("simulator-validation", what, arguments, figures, setting, details), options.json)


def _setup(cost: StepCost, policy: str) -> Setup:
    return Setup(
        num_workers={Role.PREFILL: 2, Role.DECODE: 2},
        cost=cost,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK,
        trace_block=BLOCK,
        vocab_size=VOCAB,
        router=RouterConfig.model_validate({"policy": policy}),
        scheduler=LIMITS,
    )


def _compared(policy: str, real: Sequence[Record], simulated: Sequence[Record]) -> list[Figure]:
    span_s = real[-1].at_s + 1
    measured, expected = (Outcome.of(policy, each, OBJECTIVE, from_s=0, to_s=span_s) for each in (real, simulated))
    rows = (
        ("hit rate", 1.0, "", measured.hit_rate, expected.hit_rate),
        ("hit or fetched", 1.0, "", measured.hit_rate + measured.fetch_rate, expected.hit_rate + expected.fetch_rate),
        ("TTFT p50", 1e3, "ms", measured.ttft_p50, expected.ttft_p50),
        ("TTFT p99", 1e3, "ms", measured.ttft_p99, expected.ttft_p99),
        ("between tokens p50", 1e3, "ms", measured.gap_p50, expected.gap_p50),
    )
    return [
        Figure(
            f"{name}, {policy}",
            factor * simulated_value,
            unit,
            factor * real_value,
            note=f"bound: the real one; error {simulated_value / real_value - 1:+.0%}" if real_value else "",
        )
        for name, factor, unit, real_value, simulated_value in rows
    ]


def _alone(policy: str, cost: StepCost, idle_s: float) -> Figure:
    """A long prompt on the idle cluster, which the costs were not found from: what steps alone are off by."""
    trace = TraceRequest(0, _READ_BLOCKS * BLOCK, _NUM_TOKENS, tuple(range(_READ_BLOCKS)))
    (record,) = simulate(_setup(cost, policy), [trace])
    note = f"{_READ_BLOCKS * BLOCK} tokens; bound: the real one; error {record.ttft_s / idle_s - 1:+.0%}"
    return Figure(f"TTFT alone, {policy}", 1e3 * record.ttft_s, "ms", 1e3 * idle_s, note=note)


# ---------------------------------------------------------------- the real cluster


async def _serve(
    folder: Path, policy: str, block_bytes: int, coefficients: Sequence[float], trace: Sequence[TraceRequest]
) -> tuple[StepCost, float, float, list[Record]]:
    """Also the TTFT of a prompt of _READ_BLOCKS blocks with nothing beside it, the cores that others than the workers
    kept busy while the trace ran, and what became of it."""
    settings: Mapping[str, object] = {
        "model.path": str(folder),
        "model.load_format": "dummy",
        "kv.block_size": BLOCK,
        "kv.num_blocks": NUM_BLOCKS,
        "scheduler.max_batched_tokens": LIMITS.max_batched_tokens,
        "scheduler.max_sequences": LIMITS.max_sequences,
        "scheduler.chunk_tokens": LIMITS.chunk_tokens,
        "router.policy": policy,
        "transfer.late_read_s": 5.0,
        "transfer.stuck_read_s": 15.0,
    }
    async with plain_cluster(settings, prefill=2, decode=2) as cluster:
        cost, idle_s = await _costs(cluster, block_bytes, coefficients)
        await cluster.router.clear_cache()
        started, started_cpu, neighbours = time.monotonic(), time.process_time(), Neighbours()
        records = [Record(request, request.at_ms / 1000) for request in trace]
        async with asyncio.TaskGroup() as tasks:
            for number, record in enumerate(records):
                tasks.create_task(_send(cluster, f"r{number}", record, started))
        router_cores = (time.process_time() - started_cpu) / (time.monotonic() - started)
        return cost, idle_s, neighbours.num_cores() + router_cores, records


async def _send(
    cluster: PlainCluster, request_id: str, record: Record, started: float, reads: list[float] | None = None
) -> None:
    """`reads` is given the seconds that its reads took."""
    await asyncio.sleep(max(0.0, started + record.at_s - time.monotonic()))
    request = record.request
    sampling = SamplingParams(max_tokens=request.num_output, ignore_eos=True)
    async for tokens, answer in cluster.stream(request.prompt(VOCAB, BLOCK), sampling, request_id):
        now = time.monotonic() - started
        if tokens and record.first_at_s is None:
            record.first_at_s = now
        if answer is not None:
            route = answer.route
            record.last_at_s, record.num_tokens = now, len(answer.token_ids)
            record.hit_tokens = (
                route.decode_prefix_hit_tokens if route.local_prefill else route.prefill_prefix_hit_tokens
            )
            if reads is not None:
                reads.append(route.transfer_s)
            record.fetched_tokens = route.fetched.blocks * BLOCK


async def _costs(cluster: PlainCluster, block_bytes: int, coefficients: Sequence[float]) -> tuple[StepCost, float]:
    """Prompts through the idle cluster, one after the other: of a block, and of some. Beside the steps themselves they
    tell what words and reads take, and a worker between two steps."""
    fixed, prompt_token, attention, sequence, context_token = coefficients
    reads: dict[int, list[float]] = {1: [], _READ_BLOCKS: []}
    firsts: list[float] = []
    gaps: list[float] = []
    longs: list[float] = []
    for number in range(2 * _NUM_SHORT):
        num_blocks = _READ_BLOCKS if number % 2 else 1
        trace = TraceRequest(
            0, num_blocks * BLOCK, _NUM_TOKENS, tuple(range(1000 * number, 1000 * number + num_blocks))
        )
        record = Record(trace, 0.0)
        await _send(cluster, f"idle{number}", record, time.monotonic(), reads[num_blocks])
        if num_blocks == 1:
            firsts.append(record.ttft_s)
            gaps.append(record.mean_gap_s)
        else:
            longs.append(record.ttft_s)
    fixed += max(0.0, statistics.median(gaps) - fixed - sequence - context_token * BLOCK)
    short, long = (statistics.median(reads[number]) for number in (1, _READ_BLOCKS))
    cost = StepCost(
        fixed=fixed,
        prompt_token=prompt_token,
        attention=attention,
        sequence=sequence,
        context_token=context_token,
        read=short,
        bytes_per_s=block_bytes * (_READ_BLOCKS - 1) / max(1e-6, long - short),
        block_bytes=block_bytes,
        words=0.0,
    )
    step_s = fixed + BLOCK * (prompt_token + attention * BLOCK / 2)
    words = max(0.0, (statistics.median(firsts) - step_s) / _FRAMES)
    return replace(cost, words=words), statistics.median(longs)

"""The autoscaler over a day of traffic, in virtual time.

    python -m benchmarks.simulator day [--hours 2] [--peak 1.0] [--max-workers 8] [--plot FILE] [--json FILE]

The curve of a day, pressed into `--hours`, so that the load changes as many times faster. The pools of prefill and of
decode workers are resized each second by cluster/autoscaler.py as it is; a worker is ready after START_S, and one that
is not wanted any more ends what it has. Workers take ten times as long for everything as an H200, so that a simulation
of a few thousand requests fills several.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from benchmarks.report import Figure, Report, Setting, progress, publish
from benchmarks.simulator.cluster import Record, Setup, SimulatedCluster
from benchmarks.simulator.comparison import CHAT
from benchmarks.simulator.outcome import Objective, Outcome
from benchmarks.simulator.scaling_plot import draw
from benchmarks.simulator.step_cost import COSTS
from benchmarks.simulator.trace import TraceRequest
from benchmarks.simulator.traffic import DAY_S, day
from benchmarks.simulator.virtual_time import run as run_in_virtual_time
from cluster.autoscaler import PoolLimits, PoolLoad, PoolState, Targets, resize
from cluster.config import AutoscalingConfig, Role

SLOWER = 10
START_S = 10.0
STEP_S = 1.0
OBJECTIVE = Objective(ttft_s=5.0, gap_s=0.25)
_HOLD_S = 60.0  # between two moments of the picture


@dataclass(frozen=True, slots=True)
class Moment:
    """Workers at a time, ready or on their way, and the rate of arrivals since the moment before."""

    at_s: float
    num_prefill: int
    num_decode: int
    rate: float


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hours", type=float, default=2.0, help="that a day takes")
    parser.add_argument("--peak", type=float, default=1.0, help="sessions that begin in a second, at the peak")
    parser.add_argument("--max-workers", type=int, default=8, help="of each pool")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)


def run(options: argparse.Namespace) -> None:
    setting, span_s = Setting.here(), 3600 * options.hours
    talk = replace(CHAT.lasting(span_s), sessions_per_s=options.peak, swing=lambda at_s: day(at_s * DAY_S / span_s))
    trace = talk.requests()
    progress(f"{len(trace)} requests")
    records, moments = run_in_virtual_time(live_through(_setup(), trace, options.max_workers))
    outcome = Outcome.of("kv_aware", records, OBJECTIVE, from_s=0, to_s=span_s)
    used = [sum(getattr(moment, name) for moment in moments) for name in ("num_prefill", "num_decode")]
    resizes = sum(
        (before.num_prefill, before.num_decode) != (after.num_prefill, after.num_decode)
        for before, after in pairwise(moments)
    )
    most = [max(getattr(moment, name) for moment in moments) for name in ("num_prefill", "num_decode")]
    figures = [
        Figure("requests that kept the objectives", outcome.goodput / outcome.rate, "", 1.0, note=f"of {len(records)}"),
        Figure("TTFT p50", 1e3 * outcome.ttft_p50, "ms", note=f"p99 {1e3 * outcome.ttft_p99:.0f}"),
        Figure("prefill workers, mean", used[0] / len(moments), "", note=f"most {most[0]}"),
        Figure("decode workers, mean", used[1] / len(moments), "", note=f"most {most[1]}"),
        Figure("moments with another size", resizes, "", note=f"of {len(moments)}, one every {_HOLD_S:g} s"),
    ]
    what = f"the autoscaler over a day of traffic in {options.hours:g} h, {len(trace)} requests, in virtual time"
    arguments = {"hours": options.hours, "peak": options.peak, "max_workers": options.max_workers}
    details = {"outcome": asdict(outcome), "objective": asdict(OBJECTIVE)}
    publish(Report("simulator-day", what, arguments, figures, setting, details), options.json)
    if options.plot:
        draw(
            options.plot, moments, title="A day of traffic, and the workers for it", footer=f"{what}; {setting.commit}"
        )


def _setup() -> Setup:
    h200 = COSTS["h200-8b"]
    slower = {
        name: SLOWER * getattr(h200, name)
        for name in ("fixed", "prompt_token", "attention", "sequence", "context_token", "read")
    }
    cost = replace(h200, **slower, bytes_per_s=h200.bytes_per_s / SLOWER)
    return Setup(num_workers={Role.PREFILL: 1, Role.DECODE: 1}, cost=cost, num_blocks=10_000)


async def live_through(
    setup: Setup, trace: Sequence[TraceRequest], max_workers: int
) -> tuple[list[Record], list[Moment]]:
    cluster = SimulatedCluster(setup)
    scaled = ScaledPools(cluster, max_workers)
    turning = asyncio.create_task(scaled.turn(trace))
    records = await cluster.replay(trace)
    turning.cancel()
    return records, scaled.moments


class ScaledPools:
    """What the controller does: asks the autoscaler, starts and drains workers."""

    def __init__(self, cluster: SimulatedCluster, max_workers: int) -> None:
        config = AutoscalingConfig(ttft_s=OBJECTIVE.ttft_s, inter_token_s=OBJECTIVE.gap_s)
        self.moments: list[Moment] = []
        self._cluster = cluster
        self._targets = Targets(
            ttft_s=config.ttft_s,
            inter_token_s=config.inter_token_s,
            utilization=config.utilization,
            up_after_s=config.up_after_s,
            down_after_s=config.down_after_s,
        )
        self._limits = {
            role.value: PoolLimits(roles=frozenset({role}), min_workers=1, max_workers=max_workers)
            for role in cluster.setup.num_workers
        }
        self._states = {role.value: PoolState(size=number) for role, number in cluster.setup.num_workers.items()}
        self._num_starting = dict.fromkeys(self._limits, 0)

    async def turn(self, trace: Sequence[TraceRequest]) -> None:
        """For ever."""
        loop = asyncio.get_running_loop()
        shown_at = 0.0
        while True:
            await asyncio.sleep(STEP_S)
            now = loop.time()
            self._states = resize(self._states, self._loads(now), self._limits, self._targets, now)
            for name, state in self._states.items():
                self._resize(Role(name), state.size)
            if now - shown_at >= _HOLD_S:
                arrived = sum(shown_at <= request.at_ms / 1000 < now for request in trace)
                sizes = (self._num_present(Role.PREFILL), self._num_present(Role.DECODE))
                self.moments.append(Moment(now, *sizes, arrived / (now - shown_at)))
                shown_at = now

    def _loads(self, now: float) -> dict[str, PoolLoad]:
        return {
            name: PoolLoad(
                workers=tuple(
                    worker.account.tell(worker.report(), worker.member.roles, now)
                    for worker in self._cluster.serving(Role(name))
                ),
                num_pending=self._num_starting[name],
            )
            for name in self._limits
        }

    def _num_present(self, role: Role) -> int:
        return len(self._cluster.serving(role)) + self._num_starting[role.value]

    def _resize(self, role: Role, wanted: int) -> None:
        """Workers on their way are not called back: they are drained when they have come."""
        for _ in range(wanted - self._num_present(role)):
            self._num_starting[role.value] += 1
            asyncio.get_running_loop().call_later(START_S, self._started, role)
        for worker in self._cluster.serving(role)[wanted:]:
            self._cluster.remove(worker)

    def _started(self, role: Role) -> None:
        self._num_starting[role.value] -= 1
        self._cluster.add(role)

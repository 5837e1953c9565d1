"""Conservation in virtual time: every request ends with its tokens, every block comes back; a seed gives one run."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulator.cluster import Setup, SimulatedCluster, simulate
from benchmarks.simulator.cores import Cores
from benchmarks.simulator.scaling import live_through
from benchmarks.simulator.step_cost import COSTS
from benchmarks.simulator.trace import TraceRequest
from benchmarks.simulator.traffic import Conversations
from benchmarks.simulator.virtual_time import Stalled, run
from cluster.config import LimitsConfig, Role, RouterConfig
from workers.engine.scheduler import SchedulerLimits

LIMITS = SchedulerLimits(
    max_batched_tokens=256, max_sequences=8, max_model_len=4096, prefill_reserve=0.2, chunk_tokens=128
)
SETUP = Setup(
    num_workers={Role.PREFILL: 2, Role.DECODE: 2},
    cost=COSTS["h200-8b"],
    num_blocks=100,
    block_size=16,
    trace_block=32,
    scheduler=LIMITS,
)
TALK = Conversations(
    sessions_per_s=5,
    span_s=6,
    seed=3,
    num_beginnings=2,
    beginning_tokens=200,
    question_tokens=30,
    answer_tokens=10,
    pause_s=1.0,
    max_tokens=900,
    trace_block=32,
)


def assert_nothing_is_left(cluster: SimulatedCluster) -> None:
    for worker in cluster.workers.values():
        worker.scheduler.check_integrity()
        counts = worker.blocks.counts(0)
        assert counts.free + counts.cached == worker.shape.num_blocks, counts
        assert not worker.num_open and not worker.scheduler.has_work


requests = st.builds(
    lambda at_ms, num_input, num_output, first: TraceRequest(
        at_ms, num_input, num_output, tuple(range(first, first + num_input // 32))
    ),
    st.integers(0, 300),
    st.integers(1, 900),
    st.integers(1, 20),
    st.sampled_from((0, 0, 1000, 2000)),
)


@settings(max_examples=15, deadline=None)
@given(
    trace=st.lists(requests, max_size=25).map(lambda found: sorted(found, key=lambda each: each.at_ms)),
    policy=st.sampled_from(("kv_aware", "round_robin", "least_loaded")),
    mode=st.sampled_from(("fallback", "conditional", "always")),
)
def test_every_request_ends_and_every_block_comes_back(trace: list[TraceRequest], policy: str, mode: str) -> None:
    """Pools of 100 blocks, of which a prompt takes up to 57: requests wait for room, and are preempted."""
    router = RouterConfig.model_validate({"policy": policy, "local_prefill": mode})

    async def scene() -> None:
        cluster = SimulatedCluster(replace(SETUP, router=router))
        for record in await cluster.replay(trace):
            assert record.complete and record.num_tokens == record.request.num_output
            assert 0 <= record.hit_tokens + record.fetched_tokens < record.request.num_input
            assert record.first_at_s is not None and record.last_at_s is not None
            assert record.at_s < record.first_at_s <= record.last_at_s
        assert_nothing_is_left(cluster)

    run(scene())


def test_a_run_is_a_function_of_its_trace_and_setup() -> None:
    trace = TALK.requests()
    assert simulate(SETUP, trace) == simulate(SETUP, trace)
    assert simulate(SETUP, trace) != simulate(replace(SETUP, num_blocks=60), trace)


def test_going_where_the_prefix_is_computes_less() -> None:
    trace = TALK.requests()
    spared = {
        policy: sum(
            record.hit_tokens + record.fetched_tokens
            for record in simulate(replace(SETUP, router=RouterConfig.model_validate({"policy": policy})), trace)
        )
        for policy in ("kv_aware", "round_robin", "least_loaded")
    }
    assert spared["kv_aware"] > 1.1 * spared["round_robin"] and spared["kv_aware"] > 1.1 * spared["least_loaded"], (
        spared
    )


def test_what_the_admission_refuses_is_told_apart() -> None:
    trace = [TraceRequest(0, 600, 5, tuple(range(18 * n, 18 * n + 18))) for n in range(12)]
    setup = replace(SETUP, limits=LimitsConfig(max_requests=3, max_queued=2))
    records = simulate(setup, trace)
    assert [record.refused for record in records] == [False] * 5 + [True] * 7
    assert [record.complete for record in records] == [True] * 5 + [False] * 7


def test_workers_come_and_go_and_nothing_is_lost() -> None:
    trace = TALK.requests()

    async def scene() -> None:
        cluster = SimulatedCluster(SETUP)
        leaving = [next(w for w in cluster.workers.values() if role in w.member.roles) for role in SETUP.num_workers]

        def change() -> None:
            for role, worker in zip(SETUP.num_workers, leaving, strict=True):
                cluster.add(role)
                cluster.remove(worker)

        asyncio.get_running_loop().call_at(2.0, change)
        records = await cluster.replay(trace)
        assert all(record.complete for record in records)
        assert len(cluster.workers) == 4 and not {w.member.incarnation for w in leaving} & cluster.workers.keys()
        assert_nothing_is_left(cluster)

    run(scene())


@pytest.mark.parametrize(("num_cores", "num_others", "last_s"), [(2.0, 0.0, 6.0), (3.0, 2.0, 6.0), (2.0, 4.0, 13.0)])
def test_work_on_shared_cores_goes_slower_by_as_much_as_there_is_too_much_of_it(
    num_cores: float, num_others: float, last_s: float
) -> None:
    """Four jobs of 1, 2, 2 and 4 s, and one of 1 s that comes when the first has ended; others never end."""
    ended: dict[str, float] = {}

    async def scene() -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        cores = Cores(num_cores, num_others, loop)

        def end(name: str) -> None:
            ended[name] = loop.time()
            if name == "a":
                cores.compute(1.0, partial(end, "late"))
            if len(ended) == 5:
                over.set()

        for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 2.0), ("d", 4.0)):
            cores.compute(seconds, partial(end, name))
        await over.wait()

    run(scene())
    turn = (4 + num_others) / num_cores  # that a second of work takes beside three others
    assert ended == pytest.approx({"a": turn, "b": 2 * turn, "c": 2 * turn, "late": 2 * turn, "d": last_s})


def test_workers_of_one_machine_keep_each_other_waiting() -> None:
    trace = TALK.requests()
    alone, shared, roomy = (simulate(replace(SETUP, num_cores=number), trace) for number in (inf, 1.0, 4.0))
    assert all(record.complete for record in shared)
    assert [each.first_at_s for each in roomy] == pytest.approx([each.first_at_s for each in alone])
    assert sum(record.ttft_s for record in shared) > 1.05 * sum(record.ttft_s for record in alone)


def test_time_passes_only_where_nothing_is_left_to_do() -> None:
    seen: list[tuple[str, float]] = []

    async def scene() -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        def see(name: str) -> None:
            seen.append((name, loop.time()))
            if name == "a day":
                over.set()

        loop.call_later(86_400.0, see, "a day")
        loop.call_later(0.5, lambda: loop.call_soon(see, "at once"))
        await over.wait()

    run(scene())
    assert [name for name, _ in seen] == ["at once", "a day"]
    assert [at for _, at in seen] == pytest.approx([0.5, 86_400.0])


def test_a_run_that_cannot_end_says_so() -> None:
    async def scene() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Stalled, match="nothing is due any more"):
        run(scene())


def test_what_a_callback_raises_ends_the_run() -> None:
    async def scene() -> None:
        asyncio.get_running_loop().call_later(1.0, [].pop)
        await asyncio.get_running_loop().create_future()

    with pytest.raises(IndexError):
        run(scene())


def test_the_autoscaler_follows_the_load_and_loses_nothing() -> None:
    """Slow workers, a burst of prompts, then silence: more of them, and later the fewest again."""
    slow = replace(SETUP.cost, fixed=0.2, prompt_token=2e-3)
    setup = replace(SETUP, num_workers={Role.PREFILL: 1, Role.DECODE: 1}, cost=slow)
    burst = [TraceRequest(200 * n, 300, 4, tuple(range(20 * n, 20 * n + 9))) for n in range(150)]
    last = TraceRequest(400_000, 10, 1, ())

    async def scene() -> None:
        records, moments = await live_through(setup, [*burst, last], max_workers=4)
        assert all(record.complete for record in records)
        sizes = [moment.num_prefill for moment in moments]
        assert max(sizes) > 1 and sizes[-1] == 1 and max(sizes) <= 4, sizes

    run(scene())

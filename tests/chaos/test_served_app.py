"""Deaths around an app in Serve: of ingress replicas, and of the controller. With --full, twenty of each."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from random import Random

import psutil
import pytest
from ray.exceptions import RayError

from cluster.config_file import parse
from cluster.controller import Status
from deploy import life
from tests.support.chaos import is_greedy, prompts
from tests.support.checkpoints import checkpoint
from tests.support.serve_app import ServedApp, Stream, served_app, until

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(240)]

NUM_REPLICAS = 3
NUM_VICTIMS = 2  # of one round: Serve starts their successors side by side
NUM_STREAMS = 3 * NUM_REPLICAS  # HAProxy gives each replica its share
NUM_TOKENS = 300
APP = "served"


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def served(runner: asyncio.Runner) -> Iterator[ServedApp]:
    config = parse(
        {
            "name": APP,
            "model": {"path": str(checkpoint("llama")), "served_name": "model"},
            "kv": {"num_blocks": 512, "block_size": 16},
            "scheduler": {"max_sequences": 16},
            "pools": {"prefill": {"workers": 1}, "decode": {"workers": 2}},
            "words": {"heartbeat_timeout_s": 20.0},  # a busy machine is no failure here
            "transfer": {"late_read_s": 0.5, "stuck_read_s": 2.0},
            "http": {"port": 0, "replicas": NUM_REPLICAS},
            "log": {"level": "error"},
        }
    )
    with served_app(config, runner) as served:
        yield served


@pytest.fixture
def num_kills(request: pytest.FixtureRequest) -> int:
    return 20 if request.config.getoption("full") else NUM_VICTIMS


def assert_whole(stream: Stream, told: object) -> None:
    assert len(stream.tokens) == NUM_TOKENS and is_greedy(stream.prompt, tuple(stream.tokens)), f"{told}: {stream}"


def test_killed_ingress_replicas_take_their_own_requests_and_no_more(
    served: ServedApp, runner: asyncio.Runner, num_kills: int
) -> None:
    """Rounds of two deaths, each at a seeded moment of streams through the public port."""

    async def scene(seed: int) -> int:
        random = Random(seed)
        replicas, servers = await served.healthy(), await served.servers()
        victims = random.sample(replicas, NUM_VICTIMS)
        moments = sorted(random.randint(1, NUM_TOKENS // 2) for _ in victims)
        num_lost = 0
        async with served.streams(list(prompts(NUM_STREAMS, 40, 120, seed=seed)), NUM_TOKENS) as streams:
            await until(lambda: all(stream.tokens for stream in streams), "every stream has begun")
            for victim, moment in zip(victims, moments, strict=True):
                await until(
                    lambda moment=moment: any(len(s.tokens) >= moment for s in streams if not s.error),
                    f"a stream has {moment} tokens",
                )
                num_lost += await victim.num_open(served.client)
                victim.process.kill()
        broken = [stream for stream in streams if stream.error]
        assert 0 < len(broken) <= num_lost, f"{num_lost} were open on the victims: {broken}"
        for stream in streams:
            if stream.error:
                assert is_greedy(stream.prompt, tuple(stream.tokens)), f"round {seed}: {stream}"
            else:
                assert_whole(stream, f"round {seed}")
        async with served.streams(list(prompts(3, 40, 120, seed=seed)), NUM_TOKENS) as later:
            pass  # while one replica serves and the others start
        for stream in later:
            assert_whole(stream, f"round {seed}, later")
        await served.assert_all_free()

        dead = {victim.process for victim in victims}
        num_healthy = num_up = 0
        while num_healthy < NUM_REPLICAS or num_up < NUM_VICTIMS:
            num_healthy = len([replica for replica in await served.healthy() if replica.process not in dead])
            up = await served.servers()
            num_up = len(up - servers) if len(up) == NUM_REPLICAS else 0
        return len(broken)

    num_broken = [runner.run(scene(seed)) for seed in range(num_kills // NUM_VICTIMS)]
    assert sum(num_broken) >= num_kills, f"most victims served nobody: {num_broken}"


def test_a_killed_controller_is_no_business_of_streams(
    served: ServedApp, runner: asyncio.Runner, num_kills: int
) -> None:
    """Its successor answers, and has adopted the same processes; how long that took is told, and bounds nothing."""
    took_s: list[float] = []

    async def successor(of: int) -> Status:
        while True:
            try:
                status = await asyncio.to_thread(life.status, APP)
            except (RayError, ValueError):
                continue
            if status.pid != of and status.revision >= 0:  # an ingress has brought the config again
                return status

    async def scene(seed: int) -> None:
        random = Random(seed)
        victim = life.status(APP).pid
        before = served.members()
        moment = random.randint(0, NUM_TOKENS // 2)
        async with served.streams(list(prompts(4, 40, 120, seed=seed)), NUM_TOKENS) as streams:
            await until(lambda: any(len(stream.tokens) >= moment for stream in streams), f"{moment} tokens")
            os.kill(victim, signal.SIGKILL)
            killed_at = time.monotonic()
            await successor(victim)
            took_s.append(time.monotonic() - killed_at)
        for stream in streams:
            assert_whole(stream, f"run {seed}")
        after = served.members()
        assert [(m.name, m.incarnation, m.pid) for m in after] == [(m.name, m.incarnation, m.pid) for m in before]
        assert all(psutil.pid_exists(member.pid) for member in after)
        await served.assert_all_free()

    for seed in range(num_kills):
        runner.run(scene(seed))
    print(f"adopted again after {min(took_s):.2f} to {max(took_s):.2f} s")

"""The whole house: HTTP through Serve's public port, three ingress replicas, two prefill and two decode workers."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx
import psutil
import pytest
from ray.exceptions import RayError

from cluster.config_file import parse
from cluster.controller import Status
from deploy import life
from deploy.local_app import LocalApp, local_app
from tests.support.chaos import is_greedy, prompts
from tests.support.checkpoints import VOCAB_SIZE, checkpoint, decided
from tests.support.families import served
from tests.support.ray_cluster import until
from tests.support.scrape import Scrape, Target, targets
from tests.support.serve_app import ServedApp, Stream, seen

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

NUM_TOKENS = 64
BLOCK_SIZE = 16
NUM_BLOCKS = 512
NUM_REPLICAS = 3
NUM_VICTIMS = 2  # replicas of one round: Serve starts their successors side by side
NUM_STREAMS = 3 * NUM_REPLICAS  # HAProxy gives each replica its share
NUM_STREAMED = 300
APP = "public"
SESSIONS = "sluice_words_sessions"

Targets = dict[str, Target]  # by name


@dataclass(frozen=True)
class PublicPort:
    family: str
    app: LocalApp

    @property
    def url(self) -> str:
        return self.app.url

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        settings = {"model": "model", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = httpx.post(
            f"{self.url}/v1/completions", json={**settings, "return_route": True, **body}, timeout=120, trust_env=False
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ask_all(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(len(bodies)) as threads:
            return list(threads.map(self.ask, bodies))

    def targets_when(self, holds: Callable[[Targets], bool], what: str) -> Targets:
        """Any replica answers: each hears of the others with its next renewal."""
        found: Targets = {}

        def look() -> bool:
            found.clear()
            try:
                found.update({target.name: target for target in targets(self.url)})
                return holds(found)
            except (httpx.HTTPError, AssertionError):  # who was asked has just died
                return False

        asyncio.run(until(look, what, 60))
        return found


def whole(found: Targets) -> bool:
    return sorted(name.partition("-")[0] for name in found) == [
        "controller", "decode", "decode", "ingress", "ingress", "ingress", "prefill", "prefill",
    ]  # fmt: skip


def connected(found: Targets) -> bool:
    ingresses = [target for name, target in found.items() if name.startswith("ingress")]
    return whole(found) and all(each.scrape().total(SESSIONS, peer_kind="worker") == 4 for each in ingresses)


@pytest.fixture(scope="module", params=served({"llama"}))
def port(request: pytest.FixtureRequest) -> Iterator[PublicPort]:
    config = parse(
        {
            "name": APP,
            "model": {"path": str(checkpoint(request.param)), "served_name": "model"},
            "kv": {"num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE},
            "scheduler": {"max_batched_tokens": 96, "chunk_tokens": 32, "max_sequences": 16},
            "pools": {"prefill": {"workers": 2}, "decode": {"workers": 2}},
            "router": {"local_prefill": "never"},
            "words": {"heartbeat_timeout_s": 20.0},  # a busy machine is no failure here
            "http": {"port": 0, "replicas": NUM_REPLICAS},
            "log": {"level": "error"},
        }
    )
    with local_app(config, lambda _: None) as made:
        port = PublicPort(request.param, made)
        port.targets_when(connected, "all workers serve all replicas")
        yield port


def test_greedy_equals_transformers(port: PublicPort) -> None:
    random = Random(0)
    prompts = [[random.randrange(1, VOCAB_SIZE) for _ in range(random.randint(100, 160))] for _ in range(40)]
    runs = decided(port.family, tuple(map(tuple, prompts)), 8, NUM_TOKENS)
    answers = port.ask_all([{"prompt": run.prompt, "max_tokens": NUM_TOKENS} for run in runs])
    seen: set[int] = set()
    workers: set[str] = set()
    for run, answer in zip(runs, answers, strict=True):
        tokens = answer["choices"][0]["token_ids"]
        assert tokens == run.tokens
        seen.update(tokens)
        route = answer["usage"]["sluice"]
        hits = route["decode_prefix_hit_tokens"] // BLOCK_SIZE
        assert route["blocks"] == -(-len(run.prompt) // BLOCK_SIZE) - hits
        assert route["chunks"] >= 3 and route["transport"] == "nixl" and not route["local_prefill"]
        workers |= {route["prefill"]["name"], route["decode"]["name"]}
    assert len(seen) >= 100, f"{len(seen)} different tokens prove little"
    assert workers == {"prefill-0", "prefill-1", "decode-0", "decode-1"}


def test_stream_and_whole_answer_are_the_same(port: PublicPort) -> None:
    prompt = list(range(3, 90))
    whole = port.ask({"prompt": prompt, "max_tokens": 20, "seed": 7, "temperature": 0.9, "top_p": 0.9})
    tokens: list[int] = []
    body = {"model": "model", "prompt": prompt, "max_tokens": 20, "seed": 7, "temperature": 0.9, "top_p": 0.9}
    body |= {"stream": True, "ignore_eos": True, "return_token_ids": True}
    with httpx.stream("POST", f"{port.url}/v1/completions", json=body, timeout=60, trust_env=False) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        for choice in httpx.Response(200, text=line).json()["choices"]:
            tokens += choice.get("token_ids") or []
    assert tokens == whole["choices"][0]["token_ids"]


def test_health_models_and_metrics(port: PublicPort) -> None:
    with httpx.Client(base_url=port.url, trust_env=False) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["model"]
        metrics = client.get("/metrics").text
    assert 'sluice_words_sessions{peer_kind="worker"} 4.0' in metrics


def test_every_process_is_scraped_and_the_sums_are_what_was_served(port: PublicPort) -> None:
    found = port.targets_when(whole, "all eight processes are named")
    for name, target in found.items():
        labels = target.labels
        assert (labels["app"], labels["model"], labels["role"]) == (APP, "model", name.partition("-")[0])
    assert len({target.address for target in found.values()}) == len({t.incarnation for t in found.values()}) == 8

    random = Random(77)
    bodies = [
        {"prompt": [random.randrange(1, VOCAB_SIZE) for _ in range(random.randint(60, 100))], "max_tokens": 20}
        for _ in range(8)
    ]
    before = {name: target.scrape() for name, target in found.items()}
    answers = port.ask_all(bodies)
    after = {name: target.scrape() for name, target in found.items()}

    def grew(role: str, metric: str, **labels: str) -> float:
        names = [name for name in found if name.partition("-")[0] == role]
        return sum(after[name].total(metric, **labels) - before[name].total(metric, **labels) for name in names)

    num_prompt = sum(len(body["prompt"]) for body in bodies)
    num_tokens = sum(len(answer["choices"][0]["token_ids"]) for answer in answers)
    routes = [answer["usage"]["sluice"] for answer in answers]
    assert num_tokens == 8 * 20 and not any(route["prefix_hit_tokens"] or route["preemptions"] for route in routes)
    assert grew("ingress", "sluice_ingress_requests_total", outcome="ok") == 8
    assert grew("ingress", "sluice_ingress_prompt_tokens_total") == num_prompt
    assert grew("ingress", "sluice_ingress_generated_tokens_total") == num_tokens
    assert grew("prefill", "sluice_engine_sampled_tokens_total") == 8
    assert grew("decode", "sluice_engine_sampled_tokens_total") == num_tokens - 8
    assert grew("prefill", "sluice_engine_computed_tokens_total") == num_prompt
    assert grew("decode", "sluice_engine_computed_tokens_total") == num_tokens - 8  # nobody needs the last one's KV
    assert grew("decode", "sluice_transfer_bytes_total", transport="nixl") == sum(route["bytes"] for route in routes)
    assert grew("decode", "sluice_transfer_pulled_blocks_total") == sum(route["blocks"] for route in routes)
    for role in ("prefill", "decode"):
        assert grew(role, "sluice_engine_queue_seconds_count", stage=role) == 8
        assert grew(role, "sluice_engine_prefix_lookup_tokens_total", stage=role) == num_prompt
        assert grew(role, "sluice_engine_batch_sequences_count") == grew(role, "sluice_engine_step_seconds_count") > 0
        for name in (f"{role}-0", f"{role}-1"):
            _check_gauges(after[name])
            assert after[name].values("sluice_transfer_bytes_total", "peer") <= set(found) - {name}
    assert grew("decode", "sluice_transfer_read_seconds_count", transport="nixl") >= 8
    assert after["controller"].total("sluice_cluster_workers", state="ready") == 4


def _check_gauges(worker: Scrape) -> None:
    groups = worker.values("sluice_kv_blocks", "group")
    assert groups and worker.values("sluice_kv_blocks", "state") >= {"free", "filling", "ready", "cached"}
    for group in groups:
        assert worker.total("sluice_kv_blocks", group=group) == NUM_BLOCKS
    assert worker.total(SESSIONS, peer_kind="ingress") == NUM_REPLICAS
    assert worker.total(SESSIONS, peer_kind="worker") == 2 * 3  # it reads from all, and all from it


@pytest.mark.chaos
@pytest.mark.parametrize("port", ["llama"], indirect=True)
def test_killed_processes_are_no_targets_and_their_successors_are(port: PublicPort) -> None:
    before = port.targets_when(whole, "all eight processes are named")
    killed = [before["decode-0"], next(target for name, target in before.items() if name.startswith("ingress"))]
    for target in killed:
        os.kill(_listener(target.address), signal.SIGKILL)
    dead = {target.incarnation for target in killed}
    replaced = port.targets_when(
        lambda found: whole(found) and dead.isdisjoint(target.incarnation for target in found.values()),
        "both have successors",
    )
    assert replaced["decode-1"] == before["decode-1"] and replaced["prefill-0"] == before["prefill-0"]
    scrapes = {name: target.scrape() for name, target in replaced.items()}
    assert scrapes["decode-0"].total("sluice_engine_sampled_tokens_total") == 0
    assert scrapes["controller"].total("sluice_cluster_restarts_total", pool="decode") == 1
    for name in ("prefill-0", "decode-1"):  # two of the worker, one of the replica
        assert scrapes[name].total("sluice_words_broken_sessions_total", reason="gone") == 3


def _listener(address: str) -> int:
    port = int(address.rpartition(":")[2])
    connections = psutil.net_connections("tcp")
    (pid,) = {each.pid for each in connections if each.laddr[1:] == (port,) and each.status == psutil.CONN_LISTEN}
    assert pid is not None
    return pid


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def app(port: PublicPort, runner: asyncio.Runner) -> Iterator[ServedApp]:
    port.targets_when(connected, "successors of the killed are there")
    with seen(port.app, runner) as app:
        runner.run(all_up(app))
        yield app


async def all_up(app: ServedApp) -> None:
    """HAProxy sends requests to all replicas."""
    async with asyncio.timeout(60):
        while len(await app.servers()) < NUM_REPLICAS or len(await app.healthy()) < NUM_REPLICAS:
            await asyncio.sleep(0.05)


@pytest.fixture
def num_kills(request: pytest.FixtureRequest) -> int:
    return 20 if request.config.getoption("full") else NUM_VICTIMS


def assert_whole(stream: Stream, told: object) -> None:
    assert len(stream.tokens) == NUM_STREAMED and is_greedy(stream.prompt, tuple(stream.tokens)), f"{told}: {stream}"


@pytest.mark.chaos
@pytest.mark.parametrize("port", ["llama"], indirect=True)
def test_killed_ingress_replicas_take_their_own_requests_and_no_more(
    app: ServedApp, runner: asyncio.Runner, num_kills: int
) -> None:
    """Rounds of two deaths, each at a seeded moment of streams. With --full, twenty deaths."""

    async def scene(seed: int) -> int:
        random = Random(seed)
        replicas, servers = await app.healthy(), await app.servers()
        victims = random.sample(replicas, NUM_VICTIMS)
        moments = sorted(random.randint(1, NUM_STREAMED // 2) for _ in victims)
        num_lost = 0
        async with app.streams(list(prompts(NUM_STREAMS, 40, 120, seed=seed)), NUM_STREAMED) as streams:
            await until(lambda: all(stream.tokens for stream in streams), "every stream has begun", 60)
            for victim, moment in zip(victims, moments, strict=True):
                await until(
                    lambda moment=moment: any(len(s.tokens) >= moment for s in streams if not s.error),
                    f"a stream has {moment} tokens",
                    60,
                )
                num_lost += await victim.num_open(app.client)
                victim.process.kill()
        broken = [stream for stream in streams if stream.error]
        assert 0 < len(broken) <= num_lost, f"{num_lost} were open on the victims: {broken}"
        for stream in streams:
            if stream.error:
                assert is_greedy(stream.prompt, tuple(stream.tokens)), f"round {seed}: {stream}"
            else:
                assert_whole(stream, f"round {seed}")
        async with app.streams(list(prompts(3, 40, 120, seed=seed)), NUM_STREAMED) as later:
            pass  # while one replica serves and the others start
        for stream in later:
            assert_whole(stream, f"round {seed}, later")
        await app.assert_all_free()

        dead = {victim.process for victim in victims}
        num_healthy = num_up = 0
        while num_healthy < NUM_REPLICAS or num_up < NUM_VICTIMS:
            num_healthy = len([replica for replica in await app.healthy() if replica.process not in dead])
            up = await app.servers()
            num_up = len(up - servers) if len(up) == NUM_REPLICAS else 0
            await asyncio.sleep(0.05)
        return len(broken)

    num_broken = [runner.run(scene(seed)) for seed in range(num_kills // NUM_VICTIMS)]
    assert sum(num_broken) >= num_kills, f"most victims served nobody: {num_broken}"


@pytest.mark.chaos
@pytest.mark.parametrize("port", ["llama"], indirect=True)
def test_a_killed_controller_is_no_business_of_streams(app: ServedApp, runner: asyncio.Runner, num_kills: int) -> None:
    """Its successor answers, and has adopted the same processes; how long that took is told, and bounds nothing. With
    --full, twenty deaths."""
    took_s: list[float] = []

    async def successor(of: int) -> Status:
        while True:
            await asyncio.sleep(0.05)
            try:
                status = await asyncio.to_thread(life.status, APP)
            except (RayError, ValueError):
                continue
            if status.pid != of and status.revision >= 0:  # an ingress has brought the config again
                return status

    async def scene(seed: int) -> None:
        random = Random(seed)
        victim = life.status(APP).pid
        before = app.members()
        moment = random.randint(0, NUM_STREAMED // 2)
        async with app.streams(list(prompts(4, 40, 120, seed=seed)), NUM_STREAMED) as streams:
            await until(lambda: any(len(stream.tokens) >= moment for stream in streams), f"{moment} tokens", 60)
            os.kill(victim, signal.SIGKILL)
            killed_at = time.monotonic()
            await successor(victim)
            took_s.append(time.monotonic() - killed_at)
        for stream in streams:
            assert_whole(stream, f"run {seed}")
        after = app.members()
        assert [(m.name, m.incarnation, m.pid) for m in after] == [(m.name, m.incarnation, m.pid) for m in before]
        assert all(psutil.pid_exists(member.pid) for member in after)
        await app.assert_all_free()

    for seed in range(num_kills):
        runner.run(scene(seed))
    print(f"adopted again after {min(took_s):.2f} to {max(took_s):.2f} s")

"""Two routers over real workers: requests go where their prefix is, and both know what every cache holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from random import Random
from uuid import uuid4

import pytest

from cluster.hashing import block_hashes, chain_root
from cluster.log import Log
from cluster.membership import Membership
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import SamplingParams
from router.flight import RouterRequest, TokenDelta
from router.prefix_index import keys_of
from router.router import Router
from tests.support.certificates import Authority
from tests.support.checkpoints import VOCAB_SIZE, checkpoint
from tests.support.plain_cluster import SECRET, PlainCluster, running_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

BLOCK_SIZE = 16
NUM_BLOCKS = 48  # of each worker
SETTINGS = {
    "kv.block_size": BLOCK_SIZE,
    "kv.num_blocks": NUM_BLOCKS,
    "scheduler.max_batched_tokens": 96,
    "scheduler.chunk_tokens": 32,
    "router.policy": "kv_aware",
    "router.prefill_weight": 1000.0,  # whatever rates a busy machine measures
    "transfer.fetch_peers": 0,  # so that what is cached elsewhere is never as good as here
    "words.heartbeat_timeout_s": 20.0,
    "words.step_timeout_s": 20.0,  # a busy machine is no failure here
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PlainCluster, asyncio.Runner]]:
    """All sessions of it are under TLS."""
    tls = Authority(tmp_path_factory.mktemp("tls"), "cluster").settings("everybody")
    settings = {**SETTINGS, "model.path": str(checkpoint("llama")), "words.tls": tls}
    with running_cluster(settings, prefill=2, decode=2) as (cluster, runner):
        yield cluster, runner


@asynccontextmanager
async def replica(cluster: PlainCluster) -> AsyncIterator[tuple[Router, Metrics]]:
    """Another router of the same cluster."""
    config, metrics = cluster.config, Metrics()
    identity = pb.Identity(kind=pb.INGRESS, name=f"ingress-{uuid4().hex[:4]}", incarnation=uuid4().hex)
    log = Log.open("router", config.log)
    router = Router(
        config.router, config.limits, cluster.words, identity, SECRET, metrics, log, block_size=config.kv.block_size
    )
    await router.start()
    try:
        follow(router, cluster)
        await cluster.until(lambda: num_alive(metrics) == len(cluster.workers), "every event stream is alive")
        yield router, metrics
    finally:
        await router.stop()


def follow(router: Router, cluster: PlainCluster) -> None:
    members = tuple(worker.member for worker in cluster.workers.values() if worker.member is not None)
    router.update_membership(Membership(1, members))


def num_alive(metrics: Metrics) -> int:
    return sum(
        int(sample.value)
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "sluice_router_event_stream_alive"
    )


async def ask(
    router: Router,
    prompt: list[int],
    num_tokens: int,
    *,
    leave_after: int = 10**9,
    request_id: str = "",
    cache_salt: str = "",
) -> list[TokenDelta]:
    """All deltas, or those before the client left."""
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    request = RouterRequest(
        request_id=request_id or uuid4().hex,
        prompt_token_ids=tuple(prompt),
        sampling=sampling,
        cache_salt=cache_salt,
    )
    deltas: list[TokenDelta] = []
    async with aclosing(router.generate(request)) as stream:
        async for delta in stream:
            deltas.append(delta)
            if sum(len(each.token_ids) for each in deltas) >= leave_after:
                break
    return deltas


def tokens(deltas: list[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


async def known(router: Router) -> dict[str, int]:
    """By incarnation, how many blocks its index has; -1 where that is not what the worker's block table has."""
    feed = router._navigator.feed
    counts: dict[str, int] = {}
    for incarnation, answer in (await router.load()).items():
        num_cached = sum(group.cached for group in answer.load.groups)
        seat = feed.seat(incarnation, 0)
        num_held = feed.index.num_held(seat) if seat >= 0 and not feed.behind else -1
        counts[incarnation] = num_held if num_held == num_cached else -1
    return counts


async def agree(cluster: PlainCluster, *routers: Router) -> None:
    """Each index has as many blocks of each worker as it caches, now that nothing runs."""
    async with asyncio.timeout(30):
        for router in routers:
            while -1 in (await known(router)).values():
                await asyncio.sleep(0.02)


def test_a_prompt_meets_the_cached_blocks_of_its_salt_only(served: tuple[PlainCluster, asyncio.Runner]) -> None:
    cluster, runner = served
    prompt = [Random(7).randrange(1, VOCAB_SIZE) for _ in range(100)]

    async def scene() -> None:
        await cluster.router.clear_cache()
        async with replica(cluster) as (router, metrics):

            async def hits(cache_salt: str) -> tuple[int, float]:
                """Prompt tokens that were found anywhere, and that the router expected to be."""
                before = expected(metrics)
                deltas = await ask(router, prompt, 20, cache_salt=cache_salt)
                answers.add(tuple(tokens(deltas)))
                route = deltas[-1].route
                assert route is not None
                await agree(cluster, router)
                return route.decode_prefix_hit_tokens + route.prefill_prefix_hit_tokens, expected(metrics) - before

            answers: set[tuple[int, ...]] = set()
            for cache_salt in ("ann", "bob", ""):
                assert await hits(cache_salt) == (0, 0.0)
            for cache_salt in ("bob", "", "ann"):
                found, foreseen = await hits(cache_salt)
                assert found >= 96 and foreseen >= 96  # six blocks, of decode alone or of both
            assert await hits("eve") == (0, 0.0)
            assert len(answers) == 1 and len(set(answers.pop())) > 5

    runner.run(scene())


def expected(metrics: Metrics) -> float:
    return sum(
        metrics.value("sluice_router_expected_hit_tokens_total", {"stage": stage}) for stage in ("decode", "prefill")
    )


def test_the_second_turn_goes_where_its_prefix_is(served: tuple[PlainCluster, asyncio.Runner]) -> None:
    cluster, runner = served
    random = Random(5)

    def text(count: int) -> list[int]:
        return [random.randrange(1, VOCAB_SIZE) for _ in range(count)]

    async def scene() -> None:
        async with replica(cluster) as (other, metrics):
            num_decode_hits = 0
            prompts = [text(100) for _ in range(4)]
            firsts = await asyncio.gather(*(ask(cluster.router, prompt, 20) for prompt in prompts))
            assert {first[-1].plan.prefill.name for first in firsts} == {"prefill-0", "prefill-1"}
            await agree(cluster, cluster.router, other)
            for prompt, first in zip(prompts, firsts, strict=True):  # through the router that has not seen them
                await agree(cluster, other)  # and its loads are those of now
                request = [*prompt, *tokens(first), *text(9)]
                last = (await ask(other, request, 4, request_id="second"))[-1]
                assert last.plan.prefill.name == first[-1].plan.prefill.name
                told = other.route("second")
                assert told is not None and (told.state, told.policy) == ("length", "kv_aware")
                (attempt,) = told.attempts
                hits = {each.name: each.hit_blocks * BLOCK_SIZE for each in attempt.candidates}
                home, source = first[-1].plan.decode.name, first[-1].plan.prefill.name
                assert hits == {**dict.fromkeys(hits, 0), home: 112, source: 96}  # of 119 and of 100 tokens with KV
                assert told.outcome is not None
                assert told.outcome.decode_prefix_hit_tokens == hits[last.plan.decode.name]
                assert told.outcome.prefill_prefix_hit_tokens == hits[source] == 96
                costs = [way.total_blocks or 0.0 for way in attempt.ways]
                assert attempt.ways[0].chosen and costs[0] == min(costs) and len(costs) == attempt.num_ways == 4
                num_decode_hits += told.outcome.decode_prefix_hit_tokens
            assert other.route("nobody's") is None
            for stage, expected in (("prefill", 4 * 96), ("decode", num_decode_hits)):
                for name in ("expected", "found"):
                    assert metrics.value(f"sluice_router_{name}_hit_tokens_total", {"stage": stage}) == expected

    runner.run(scene())


def test_equal_prompts_that_arrive_together_are_read_once(served: tuple[PlainCluster, asyncio.Runner]) -> None:
    """By each worker that they go to: six full blocks and a rest, and for the later ones their rest only."""
    cluster, runner = served
    text = [Random(77).randrange(1, VOCAB_SIZE - 1) for _ in range(6 * BLOCK_SIZE + 3)]

    async def scene() -> None:
        await cluster.router.clear_cache()
        answers = await asyncio.gather(*(ask(cluster.router, text, 8) for _ in range(3)))
        assert tokens(answers[0]) == tokens(answers[1]) == tokens(answers[2])
        read: dict[str, list[int]] = {}
        for deltas in answers:
            route = deltas[-1].route
            assert route is not None
            read.setdefault(route.decode.name, []).append(route.blocks)
        assert all(blocks == [7, *[1] * (len(blocks) - 1)] for blocks in read.values()), read
        await cluster.assert_all_free()

    runner.run(scene())


def test_both_indexes_are_the_block_tables_after_anything(served: tuple[PlainCluster, asyncio.Runner]) -> None:
    """Shared prefixes, cancels, evictions; then a worker is killed, and nothing of it is known."""
    cluster, runner = served
    random = Random(6)
    stems = [[random.randrange(1, VOCAB_SIZE) for _ in range(90)] for _ in range(6)]
    texts: list[list[int]] = []

    async def client(router: Router, stem: list[int]) -> None:
        prompt = [*stem[: random.randrange(20, 90)], *(random.randrange(1, VOCAB_SIZE) for _ in range(10))]
        leave_after = random.choice((1, 5, 10**9, 10**9))
        texts.append([*prompt, *tokens(await ask(router, prompt, 12, leave_after=leave_after))])

    async def scene() -> None:
        async with replica(cluster) as (other, metrics):
            routers = (cluster.router, other)
            num_rounds = num_full = 0
            while num_full < 3:  # rounds that found little room anywhere: they evict
                await asyncio.gather(*(client(random.choice(routers), random.choice(stems)) for _ in range(8)))
                most_free = max(answer.load.groups[0].free for answer in (await other.load()).values())
                num_rounds += 1
                num_full += most_free <= NUM_BLOCKS // 4
                assert num_rounds < 60, most_free
            await agree(cluster, *routers)
            async with replica(cluster) as (fresh, _):  # knows dumps only
                await agree(cluster, fresh)
                incarnations = list(await known(fresh))
                num_blocks = 0
                for text in texts:
                    root = chain_root(other._fleet.candidates()[0].compatibility_hash)
                    keys = keys_of(block_hashes(root, text, BLOCK_SIZE))
                    for incarnation in incarnations:
                        held = [holds(router, incarnation, keys) for router in (*routers, fresh)]
                        assert held[0] == held[1] == held[2]
                        num_blocks += sum(held[0])
                assert num_blocks > 100
            victim = cluster.workers["prefill-0"].member
            assert victim is not None
            before = metrics.value("sluice_router_indexed_blocks")
            await cluster.kill("prefill-0")
            cluster.publish()
            follow(other, cluster)
            for router in routers:
                await cluster.until(
                    lambda router=router: router._navigator.feed.seat(victim.incarnation, 0) < 0, "it is forgotten"
                )
            assert 0 < metrics.value("sluice_router_indexed_blocks") < before
            assert num_alive(metrics) == 3
            last = (await ask(other, texts[0], 4))[-1]
            assert last.plan.prefill.name == "prefill-1"

    runner.run(scene())


def holds(router: Router, incarnation: str, keys: object) -> list[bool]:
    """Of each block, whether the index says that this worker holds it."""
    feed = router._navigator.feed
    word, bit = divmod(feed.seat(incarnation, 0), 64)
    return [bool(int(bits[word]) >> bit & 1) for bits in feed.index.holders(keys)]  # type: ignore[arg-type]

"""Requests through real processes: the router here, prefill and decode workers there, KV over NIXL between them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest

from cluster.request import FinishReason, SamplingParams
from tests.support.checkpoints import VOCAB_SIZE, checkpoint, decided, greedy, greedy_each
from tests.support.plain_cluster import Answer, PlainCluster, running_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

NUM_TOKENS = 64
BLOCK_SIZE = 16
CHUNK = 32
SETTINGS = {
    "kv.block_size": BLOCK_SIZE,
    "kv.num_blocks": 128,
    "scheduler.max_batched_tokens": 96,
    "scheduler.chunk_tokens": CHUNK,
    "scheduler.max_sequences": 16,
    "router.local_prefill": "never",
    "words.heartbeat_timeout_s": 20.0,
    "words.step_timeout_s": 20.0,  # a busy machine is no failure here
}
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.8, top_p=0.95, top_k=50)


def prompts(count: int, seed: int, *, low: int = 100, high: int = 160) -> list[list[int]]:
    random = Random(seed)
    return [[random.randrange(1, VOCAB_SIZE) for _ in range(random.randint(low, high))] for _ in range(count)]


class Served:
    """A cluster for all tests of a family; of one of them the workers prepare the next step while one runs."""

    def __init__(self, family: str, cluster: PlainCluster, runner: asyncio.Runner) -> None:
        self.family = family
        self.cluster = cluster
        self.runner = runner

    def ask(self, texts: list[list[int]], sampling: SamplingParams | list[SamplingParams] = GREEDY) -> list[Answer]:
        """All at once."""
        each = sampling if isinstance(sampling, list) else [sampling] * len(texts)

        async def together() -> list[Answer]:
            return await asyncio.gather(*(self.cluster.ask(p, s) for p, s in zip(texts, each, strict=True)))

        return self.runner.run(together())

    def total(self, metric: str, pool: str = "") -> float:
        return self.runner.run(self.cluster.total(metric, pool))


@pytest.fixture(scope="module", params=["llama", "deepseek-v32"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    settings = {**SETTINGS, "model.path": str(checkpoint(request.param)), "engine.overlap": request.param == "llama"}
    with running_cluster(settings, prefill=2, decode=2) as (cluster, runner):
        yield Served(request.param, cluster, runner)


def test_greedy_equals_transformers(served: Served) -> None:
    runs = decided(served.family, tuple(map(tuple, prompts(16, seed=0))), 8, NUM_TOKENS)
    texts = [run.prompt for run in runs]
    before = served.total("sluice_transfer_pulled_blocks_total")
    answers = served.ask(texts)
    seen: set[int] = set()
    for run, answer in zip(runs, answers, strict=True):
        assert answer.token_ids == run.tokens
        assert answer.finish is FinishReason.LENGTH
        seen.update(answer.token_ids)
    assert len(seen) >= 100, f"{len(seen)} different tokens prove little"
    routes = [answer.route for answer in answers]
    assert all(route.chunks >= 3 for route in routes)
    assert len({route.prefill.incarnation for route in routes}) == 2
    assert len({route.decode.incarnation for route in routes}) == 2
    expected = sum(-(-len(text) // BLOCK_SIZE) for text in texts)
    assert sum(route.blocks for route in routes) == expected
    assert served.total("sluice_transfer_pulled_blocks_total") - before == expected
    assert served.total("sluice_engine_local_prefills_total") == 0
    assert all(route.transport == "nixl" and not route.local_prefill for route in routes)


def test_prefix_hits_on_both_sides_move_and_compute_less(served: Served) -> None:
    base = prompts(1, seed=1, low=120, high=120)[0]
    tails = prompts(8, seed=11, low=30, high=30)
    [run] = decided(served.family, tuple((*base, *tail) for tail in tails), 1, NUM_TOKENS)
    longer = run.prompt
    served.ask([longer[:120]])
    answers = [served.ask([longer])[0] for _ in range(4)]  # both decode workers come in turn
    for answer in answers:
        assert answer.token_ids == run.tokens
        hits = answer.route.decode_prefix_hit_tokens // BLOCK_SIZE
        assert answer.route.blocks == -(-len(longer) // BLOCK_SIZE) - hits
    assert any(answer.route.decode_prefix_hit_tokens > 0 for answer in answers)
    assert any(answer.route.prefill_prefix_hit_tokens > 0 for answer in answers)


def test_full_hit_on_the_sink_moves_nothing_and_still_releases(served: Served) -> None:
    text = prompts(1, seed=2, low=4 * BLOCK_SIZE, high=4 * BLOCK_SIZE)[0]
    answers = [served.ask([text])[0] for _ in range(3)]
    assert len({tuple(answer.token_ids) for answer in answers}) == 1
    assert answers[-1].route.decode_prefix_hit_tokens == len(text)
    assert answers[-1].route.blocks == 0
    served.runner.run(served.cluster.assert_all_free())


def test_seeded_sampling_is_the_same_alone_in_a_batch_and_after_replay(served: Served) -> None:
    texts = prompts(6, seed=3)
    params = [replace(SEEDED, seed=100 + i) for i in range(len(texts))]
    together = served.ask(texts, params)
    served.runner.run(served.cluster.router.clear_cache())
    alone = [served.ask([text], [each])[0] for text, each in zip(texts, params, strict=True)]
    assert [answer.token_ids for answer in alone] == [answer.token_ids for answer in together]
    assert len({token for answer in alone for token in answer.token_ids}) >= 100
    # What a replay does: known input is longer, the position of the next token is the same.
    known = [text + answer.token_ids[:20] for text, answer in zip(texts, alone, strict=True)]
    rests = served.ask(known, [replace(each, max_tokens=NUM_TOKENS - 20) for each in params])
    assert [rest.token_ids for rest in rests] == [answer.token_ids[20:] for answer in alone]


def test_first_token_that_ends_the_request_moves_nothing_more(served: Served) -> None:
    text = prompts(1, seed=4)[0]
    [answer] = served.ask([text], replace(GREEDY, max_tokens=1))
    assert answer.token_ids == greedy(served.family, tuple(text), 1)
    stop = replace(GREEDY, stop_token_ids=(answer.token_ids[0],))
    [stopped] = served.ask([text], stop)
    assert stopped.finish is FinishReason.STOP and stopped.token_ids == answer.token_ids
    served.runner.run(served.cluster.assert_all_free())


def test_first_block_is_pulled_before_the_last_chunk_is_computed(served: Served) -> None:
    """Pulls overlap the prefill: with n chunks, blocks have been read when the handoff has not come yet."""
    text = prompts(1, seed=5, low=400, high=400)[0]

    async def watch() -> tuple[float, Answer]:
        cluster = served.cluster
        before = await cluster.total("sluice_transfer_pulled_blocks_total", "decode")
        pulled_before_first_token = 0.0
        request = asyncio.ensure_future(anext(aiter(stream := cluster.stream(text, GREEDY))))
        while not request.done():
            pulled = await cluster.total("sluice_transfer_pulled_blocks_total", "decode") - before
            if not request.done():
                pulled_before_first_token = max(pulled_before_first_token, pulled)
        answers = [answer async for _, answer in stream]
        assert answers[-1] is not None
        return pulled_before_first_token, answers[-1]

    pulled, answer = served.runner.run(watch())
    assert 0 < pulled < -(-len(text) // BLOCK_SIZE)
    assert answer.route.chunks >= 400 // CHUNK


def test_random_cancels_leave_nothing_behind(served: Served) -> None:
    random = Random(6)
    texts = prompts(40, seed=6, low=20, high=200)

    async def cancelled(text: list[int]) -> int:
        stop_after = random.choice([0, 0, 1, 2, 10, 40, NUM_TOKENS])
        if not stop_after:
            task = asyncio.ensure_future(served.cluster.ask(text, GREEDY))
            for _ in range(random.randrange(200)):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return 0
        count = 0
        stream = served.cluster.stream(text, GREEDY)
        async for tokens, _ in stream:
            count += len(tokens)
            if count >= stop_after:
                break
        await stream.aclose()
        return count

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(cancelled(text) for text in texts))

    counts = served.runner.run(all_of_them())
    assert 0 in counts and NUM_TOKENS in counts
    served.runner.run(served.cluster.assert_all_free())


@pytest.mark.parametrize("family", ["llama"])
def test_two_full_workers_that_pull_from_each_other_all_finish(family: str) -> None:
    """Both have both roles, the router pairs across, and both pools are too small for what is asked."""
    settings = {
        **SETTINGS,
        "model.path": str(checkpoint(family)),
        "kv.num_blocks": 28,
        "router.policy": "round_robin",
        "scheduler.max_pull_wait_s": 0.5,
    }
    texts, num_tokens = prompts(16, seed=7, low=100, high=200), 96  # each grows by half a prompt, beside others
    with running_cluster(settings, mixed=2) as (cluster, runner):

        async def together() -> list[Answer]:
            return await asyncio.gather(*(cluster.ask(text, replace(GREEDY, max_tokens=num_tokens)) for text in texts))

        answers = runner.run(together())
        assert [answer.token_ids for answer in answers] == greedy_each(family, texts, num_tokens)
        crossed = {(a.route.prefill.incarnation, a.route.decode.incarnation) for a in answers if a.route.blocks}
        assert len(crossed) == 2, "the workers did not pull from each other"
        assert sum(a.route.preemptions for a in answers) > 0, "the pools were not full"
        runner.run(cluster.assert_all_free())

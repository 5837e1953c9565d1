"""Several samples of one prompt: they share its blocks, and say what independent requests would say."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from random import Random
from uuid import uuid4

import pytest

from cluster.errors import Cancelled
from cluster.request import SamplingParams
from tests.support.checkpoints import VOCAB_SIZE, checkpoint
from tests.support.plain_cluster import Answer
from tests.support.served import PATIENT, Served, serving

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

NUM_SAMPLES = 6
NUM_TOKENS = 40
BLOCK_SIZE = 16
SETTINGS = {
    **PATIENT,
    "model.path": str(checkpoint("llama")),
    "kv.block_size": BLOCK_SIZE,
    "kv.num_blocks": 128,
    "scheduler.max_batched_tokens": 96,
    "scheduler.chunk_tokens": 32,
    "scheduler.max_sequences": 16,
    "router.policy": "round_robin",
}
SEEDED = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.9, top_p=0.95, seed=5)


def prompt(length: int, seed: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(1, VOCAB_SIZE - 1) for _ in range(length)]


def cut(length: int) -> tuple[int, int]:
    """(full blocks, partial blocks)"""
    return length // BLOCK_SIZE, int(length % BLOCK_SIZE > 0)


def samples_of(served: Served, text: list[int], params: SamplingParams = SEEDED, *, led: bool) -> list[Answer]:
    """All samples at once; `led`: the others follow the first."""
    return served.runner.run(samples(served, text, params, led=led))


async def samples(served: Served, text: list[int], params: SamplingParams = SEEDED, *, led: bool) -> list[Answer]:
    await served.cluster.router.clear_cache()
    leader = uuid4().hex
    return await asyncio.gather(
        served.cluster.ask(text, params, leader),
        *(
            served.cluster.ask(text, replace(params, sample=sample), leader_id=leader if led else "")
            for sample in range(1, NUM_SAMPLES)
        ),
    )


@pytest.fixture(scope="module")
def split() -> Iterator[Served]:
    """It guesses, the other one does not."""
    guessing = {"engine.speculation": "ngram", "engine.ngram_tokens": 1, "engine.draft_tokens": 3}
    with serving({**SETTINGS, **guessing}, prefill=2, decode=2) as served:
        yield served


@pytest.fixture(scope="module")
def whole() -> Iterator[Served]:
    with serving(SETTINGS, mixed=1) as served:
        yield served


def said(answers: list[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


@pytest.fixture(scope="module")
def independent(whole: Served) -> dict[int, list[list[int]]]:
    """By prompt length: what requests that know nothing of each other say, on one worker."""
    return {length: said(samples_of(whole, prompt(length, length), led=False)) for length in (70, 96)}


@pytest.mark.parametrize("length", [70, 96])
def test_samples_share_the_full_blocks_of_their_prompt(
    split: Served, independent: dict[int, list[list[int]]], length: int
) -> None:
    full, partial = cut(length)
    before = split.total("sluice_transfer_pulled_blocks_total", "decode")

    async def watched() -> tuple[list[Answer], int]:
        asked = asyncio.ensure_future(samples(split, prompt(length, length), led=True))
        most = 0
        while not asked.done():
            for answer in (await split.cluster.router.load()).values():
                if answer.load.pairs:  # a sink
                    most = max(most, *(group.ready + group.filling for group in answer.load.groups))
        return await asked, most

    answers, most_blocks = split.runner.run(watched())
    assert said(answers) == independent[length]
    assert len({tuple(tokens) for tokens in said(answers)}) == NUM_SAMPLES, "samples are different draws"
    pulled = [answer.route.blocks for answer in answers]
    assert pulled == [full + partial] + [partial] * (NUM_SAMPLES - 1)
    moved = split.total("sluice_transfer_pulled_blocks_total", "decode") - before
    assert moved == full + NUM_SAMPLES * partial
    assert [answer.route.decode_prefix_hit_tokens for answer in answers[1:]] == [full * BLOCK_SIZE] * (NUM_SAMPLES - 1)
    assert len({answer.route.decode.incarnation for answer in answers}) == 1
    assert len({answer.route.prefill.incarnation for answer in answers}) == 1
    own = -(-(length + NUM_TOKENS) // BLOCK_SIZE) - full  # what each sample has for itself alone
    assert full < most_blocks <= full + NUM_SAMPLES * own
    split.runner.run(split.cluster.assert_all_free())


@pytest.mark.parametrize("length", [70, 96])
def test_samples_on_one_worker_compute_their_prompt_once(
    whole: Served, independent: dict[int, list[list[int]]], length: int
) -> None:
    before = whole.total("sluice_engine_computed_tokens_total")
    answers = samples_of(whole, prompt(length, length), led=True)
    assert said(answers) == independent[length]
    rest = length % BLOCK_SIZE or BLOCK_SIZE  # a sequence computes at least the block of its last token
    computed = whole.total("sluice_engine_computed_tokens_total") - before
    assert computed == length + (NUM_SAMPLES - 1) * rest + NUM_SAMPLES * (NUM_TOKENS - 1)
    whole.runner.run(whole.cluster.assert_all_free())


@pytest.mark.parametrize("params", [replace(SEEDED, max_tokens=1), replace(SEEDED, num_logprobs=2)])
def test_samples_that_end_at_their_first_token_and_samples_with_logprobs(
    split: Served, whole: Served, params: SamplingParams
) -> None:
    text = prompt(70, 70)
    alone, led = samples_of(whole, text, params, led=False), samples_of(split, text, params, led=True)
    assert said(led) == said(alone)
    for one, other in zip(led, alone, strict=True):
        assert len(one.logprobs) == len(other.logprobs) == (NUM_TOKENS if params.num_logprobs else 0)
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert abs(mine.logprob - theirs.logprob) < 2e-4
    split.runner.run(split.cluster.assert_all_free())


def test_guesses_are_tokens_where_the_same_would_be_drawn(split: Served, whole: Served) -> None:
    """A bias has the samples say five tokens again and again; in which order, their draws decide."""
    text = prompt(70, 70)
    params = replace(SEEDED, logit_bias=tuple((token, 25.0) for token in range(3, 8)), temperature=0.5)
    assert said(samples_of(split, text, params, led=True)) == said(samples_of(whole, text, params, led=False))
    accepted = split.total("sluice_engine_accepted_draft_tokens_total", "decode")
    assert 0 < accepted < split.total("sluice_engine_draft_tokens_total", "decode")
    assert split.total("sluice_engine_drafted_rows_total", "prefill") == 0, "what draws one token has nothing to guess"
    assert whole.total("sluice_engine_drafted_rows_total") == 0
    split.runner.run(split.cluster.assert_all_free())


def test_samples_go_on_when_their_leader_is_cancelled(split: Served, independent: dict[int, list[list[int]]]) -> None:
    """At any time: while they wait for it, or after."""
    text = prompt(70, 70)

    async def scene(num_turns: int) -> None:
        await split.cluster.router.clear_cache()
        leader = uuid4().hex
        first = asyncio.ensure_future(split.cluster.ask(text, SEEDED, leader))
        others = [
            asyncio.ensure_future(split.cluster.ask(text, replace(SEEDED, sample=sample), leader_id=leader))
            for sample in range(1, NUM_SAMPLES)
        ]
        for _ in range(num_turns):
            await asyncio.sleep(0)
        first.cancel()
        with suppress(asyncio.CancelledError, Cancelled):
            await first
        assert said(list(await asyncio.gather(*others))) == independent[70][1:]

    for num_turns in (1, 5, 20, 60):
        split.runner.run(scene(num_turns))
    split.runner.run(split.cluster.assert_all_free())


def test_preempted_samples_say_the_same(independent: dict[int, list[list[int]]]) -> None:
    for pools in ({"prefill": 1, "decode": 1}, {"mixed": 1}):
        with serving({**SETTINGS, "kv.num_blocks": 18, "kv.prefill_reserve": 0.1}, **pools) as served:
            answers = samples_of(served, prompt(70, 70), led=True)
            assert said(answers) == independent[70]
            assert sum(answer.route.preemptions for answer in answers) > 0, "the pool was not full"
            served.runner.run(served.cluster.assert_all_free())


def test_samples_stay_together_when_their_decode_worker_dies(
    split: Served, independent: dict[int, list[list[int]]]
) -> None:
    text = prompt(70, 70)
    cluster = split.cluster

    async def scene() -> tuple[list[Answer], str]:
        asked = asyncio.ensure_future(samples(split, text, led=True))
        names = {w.member.incarnation: name for name, w in cluster.workers.items() if w.member}
        while True:
            loads = await cluster.router.load()
            busy = [names[key] for key, a in loads.items() if a.load.pairs and a.load.num_running >= NUM_SAMPLES]
            if busy:
                break
            assert not asked.done(), "they were never all running"
        dead = cluster.workers[busy[0]].member
        assert dead is not None
        await cluster.kill(busy[0])
        answers = await asked
        await cluster.replace(busy[0])
        return answers, dead.incarnation

    answers, dead = split.runner.run(scene())
    assert said(answers) == independent[70]
    assert all(answer.attempt > 1 for answer in answers)
    [survivor] = {answer.route.decode.incarnation for answer in answers}
    assert survivor != dead
    full, _ = cut(70)
    assert all(answer.route.decode_prefix_hit_tokens >= full * BLOCK_SIZE for answer in answers[1:])
    split.runner.run(split.cluster.assert_all_free())

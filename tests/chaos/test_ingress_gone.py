"""An ingress that dies or stops reading: its requests end, those of others do not notice."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest

from cluster.protos import worker_pb2 as pb
from tests.support.chaos import GREEDY, Chaos, assert_greedy, is_greedy, prompts, running_chaos
from tests.support.ingress_process import FAILED, IngressProcess, ingress_process
from tests.support.plain_cluster import Answer

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(180)]

TEXTS = prompts(6, 40, 120, seed=4)
ENDLESS = 380  # tokens of the other ingress's requests: they outlive what happens to it
SETTINGS = {"words.heartbeat_s": 0.1, "words.heartbeat_timeout_s": 1.0}


@pytest.fixture(scope="module")
def chaos() -> Iterator[Chaos]:
    with running_chaos(SETTINGS, prefill=2, decode=2) as chaos:
        yield chaos


async def until_all_stream(other: IngressProcess, num_texts: int) -> dict[int, list[int]]:
    told: dict[int, list[int]] = {}
    while len(told) < num_texts:
        news = await other.told()
        assert news is not None, "it finished too early"
        told.setdefault(news[0], []).extend(news[2])
    return told


def busy(load: pb.LoadReport) -> int:
    return load.num_running + load.num_waiting + load.num_pulling


async def num_open(chaos: Chaos) -> int:
    return sum([busy(await chaos.watch.load(name)) for name in chaos.cluster.workers])


def test_killed_at_any_token_its_requests_end_on_all_workers_and_ours_do_not_notice(
    chaos: Chaos, request: pytest.FixtureRequest
) -> None:
    """Seeded deaths, each after another number of tokens: four, with --full twenty."""

    async def scene(seed: int, mine: list[tuple[int, ...]]) -> list[Answer]:
        random = Random(seed)
        texts = prompts(4, 40, 120, seed=seed)
        async with ingress_process(chaos.cluster, texts, ENDLESS) as other:
            for _ in range(random.randrange(1, 120)):
                assert await other.told() is not None, "it finished too early"
            assert await num_open(chaos) > 0
            ours = chaos.ask(mine)
            other.signal(signal.SIGKILL)
            return await asyncio.gather(*ours)

    for seed in range(20 if request.config.getoption("full") else 4):
        mine = Random(seed).sample(TEXTS, 2)
        for text, answer in zip(mine, chaos.runner.run(scene(seed, mine)), strict=True):
            assert_greedy(text, answer)
            assert answer.attempt == 1, f"seed {seed}"
        chaos.runner.run(chaos.cluster.assert_all_free())


def test_requests_of_an_ingress_killed_while_its_prompts_are_pulled_end_too(chaos: Chaos) -> None:
    texts = prompts(8, 300, 400, seed=5)

    async def scene() -> None:
        async with ingress_process(chaos.cluster, texts, ENDLESS) as other:
            pulling = 0
            while not pulling and not other.pipe.poll():  # the first token: on a busy machine, the pulls were missed
                pulling = sum([(await chaos.watch.load(name)).num_pulling for name in chaos.names("decode")])
            other.signal(signal.SIGKILL)
            await asyncio.to_thread(other.process.join)

    chaos.runner.run(scene())
    chaos.runner.run(chaos.cluster.assert_all_free())


def test_a_stopped_ingress_is_given_up_by_its_heartbeats_alone(chaos: Chaos) -> None:
    """Its requests end on the workers; those of ours go on in the same batches, with the same tokens."""

    async def scene() -> tuple[list[Answer], int]:
        async with ingress_process(chaos.cluster, TEXTS, ENDLESS) as other:
            await until_all_stream(other, len(TEXTS))
            other.signal(signal.SIGSTOP)
            ours = await chaos.together(TEXTS, replace(GREEDY, max_tokens=64))
            await chaos.cluster.assert_all_free()
            return ours, await num_open(chaos)

    answers, left = chaos.runner.run(scene())
    assert left == 0
    for text, answer in zip(TEXTS, answers, strict=True):
        assert_greedy(text, answer, 64)
        assert answer.attempt == 1


def test_a_reader_that_stops_holds_up_nobody_and_gets_everything_later() -> None:
    """With patient heartbeats its session stays open: what it does not read waits in its own outboxes."""
    with running_chaos({"words.heartbeat_timeout_s": 60.0, "transfer.lease_s": 60.0}, decode=1) as chaos:

        async def scene() -> tuple[list[Answer], dict[int, list[int]]]:
            async with ingress_process(chaos.cluster, TEXTS, 128) as other:
                told = await until_all_stream(other, len(TEXTS))
                other.signal(signal.SIGSTOP)
                ours = await chaos.together(TEXTS, replace(GREEDY, max_tokens=200))
                await chaos.watch.until("decode-0", lambda load: load.num_running == 0, "its requests are through")
                other.signal(signal.SIGCONT)
                return ours, await other.rest(told)

        ours, theirs = chaos.runner.run(scene())
        for index, text in enumerate(TEXTS):
            assert_greedy(text, ours[index], 200)
            assert ours[index].attempt == 1
            assert len(theirs[index]) == 128 and is_greedy(text, tuple(theirs[index]))
        chaos.runner.run(chaos.cluster.assert_all_free())


def test_an_outbox_that_overflows_ends_that_request_and_no_other() -> None:
    """The reader stops. Its long requests have more to say than may wait, its short ones do not; ours have a session
    of their own. When it reads again it finds its short ones whole, and the word that the others are over."""
    num_short, num_long = 3, 40  # more than gRPC and the kernel take into their buffers
    texts = prompts(num_short + num_long, 40, 80, seed=6)
    max_tokens = [40] * num_short + [ENDLESS] * num_long
    settings = {
        "kv.num_blocks": 640,
        "words.heartbeat_timeout_s": 60.0,
        "words.outbox_max_request_bytes": 64 << 10,  # some 60 tokens with their ids, counted as they came
        "transfer.lease_s": 60.0,
        "router.max_attempts": 1,
    }
    with running_chaos(settings, decode=1) as chaos:

        async def scene() -> tuple[list[Answer], dict[int, list[int]], set[int], float]:
            async with ingress_process(chaos.cluster, texts, max_tokens, id_bytes=1000) as other:
                told: dict[int, list[int]] = {index: [] for index in range(len(texts))}
                while not all(told[index] for index in range(num_short)):
                    news = await other.told()
                    assert news is not None
                    told[news[0]] += news[2]
                other.signal(signal.SIGSTOP)
                ours = await chaos.together(TEXTS[:2], replace(GREEDY, max_tokens=200))
                await chaos.watch.until("decode-0", lambda load: not busy(load), "all ended")
                num_overflows = await chaos.watch.counter("decode-0", "sluice_words_overflows_total")
                await chaos.cluster.assert_all_free()  # while it has still not read a word of it
                other.signal(signal.SIGCONT)
                failed: set[int] = set()
                while (news := await other.told()) is not None:
                    index, first, tokens = news
                    if first == FAILED:
                        failed.add(index)
                    else:
                        assert first == len(told[index]), "a token was lost or doubled"
                        told[index] += tokens
                return ours, told, failed, num_overflows

        ours, theirs, failed, num_overflows = chaos.runner.run(scene())
        for text, answer in zip(TEXTS, ours, strict=False):
            assert_greedy(text, answer, 200)
            assert answer.attempt == 1
        assert 0 < len(failed) == num_overflows
        assert min(failed) >= num_short, "a short one was ended"
        for index, text in enumerate(texts):
            assert is_greedy(text, tuple(theirs[index]))
            assert (len(theirs[index]) == max_tokens[index]) == (index not in failed)
        [later] = chaos.runner.run(chaos.together([TEXTS[2]]))
        assert_greedy(TEXTS[2], later)
        chaos.runner.run(chaos.cluster.assert_all_free())

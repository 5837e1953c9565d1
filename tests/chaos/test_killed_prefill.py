"""SIGKILL of a prefill worker, at every moment of a prompt: its clients notice nothing but time.

With --full twenty deaths; `tests.chaos` makes more of them, at moments nobody chose.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from enum import Enum, auto
from random import Random

import pytest

from tests.support.chaos import BLOCK_SIZE, Chaos, assert_greedy, prompts, running_chaos
from tests.support.plain_cluster import Answer

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(180)]

NUM_RUNS, NUM_SHORT_RUNS = 20, 6
FROZEN_S = 0.7  # a worker that is silent for about twice as long is given up
TEXTS = prompts(6, 300, 440)
LATER = prompts(1, 300, 440, seed=8)[0]
PULLED = "sluice_transfer_pulled_blocks_total"


class Moment(Enum):
    BEFORE = auto()  # asked, nothing computed
    DURING = auto()  # some blocks were read, the first token is not there
    AFTER = auto()  # everything that FROZEN_S suffices for is computed and told, the blocks are being read


async def kill_at(
    chaos: Chaos, moment: Moment, victim: str, texts: list[tuple[int, ...]], when: Random
) -> list[Answer]:
    """Asks for all texts at once and kills the victim when the moment has come."""
    watch = chaos.watch
    match moment:
        case Moment.BEFORE:
            chaos.freeze(victim)  # it hears of nothing any more
            tasks = chaos.ask(texts)
            await chaos.until_served(len(texts), "decode-0")
        case Moment.DURING:
            before = await watch.counter("decode-0", PULLED)
            threshold = when.randint(1, 10)
            tasks = chaos.ask(texts)
            while await watch.counter("decode-0", PULLED) - before < threshold:
                await asyncio.sleep(0)
        case Moment.AFTER:
            tasks = chaos.ask(texts)
            await watch.until("decode-0", lambda load: load.num_pulling == len(texts), "all asked")
            chaos.freeze("decode-0")  # reads stop, at whatever they are
            with suppress(TimeoutError):  # a slow machine has something left to compute then
                async with asyncio.timeout(FROZEN_S):
                    await watch.until(victim, lambda load: load.num_waiting + load.num_running == 0, "all computed")
    await chaos.cluster.kill(victim)
    if moment is Moment.AFTER:
        chaos.thaw("decode-0")
    return await asyncio.gather(*tasks)


async def kill_with_blocks_missing(chaos: Chaos, victim: str) -> tuple[tuple[int, ...], Answer]:
    """Freezes the victim in the middle of a prompt, and kills it if it was not too late; else the next prompt."""
    for text in TEXTS:
        before = await chaos.watch.counter("decode-0", PULLED)
        [task] = chaos.ask([text])
        while await chaos.watch.counter("decode-0", PULLED) == before:
            await asyncio.sleep(0)
        chaos.freeze(victim)
        num_blocks = await chaos.watch.counter("decode-0", PULLED) - before
        if num_blocks < len(text) // BLOCK_SIZE - 4:  # as many may be on their way
            await chaos.cluster.kill(victim)
            return text, await task
        chaos.thaw(victim)
        await task
    raise AssertionError("every prompt was computed before it could be frozen")


def went_on(answer: Answer) -> bool:
    return answer.route.spare_used > 0 or answer.route.recomputed_tokens > 0


def test_killed_at_any_moment_a_spare_goes_on(request: pytest.FixtureRequest) -> None:
    num_runs = NUM_RUNS if request.config.getoption("full") else NUM_SHORT_RUNS
    hurt: Counter[Moment] = Counter()
    with running_chaos(prefill=2) as chaos:
        for seed in range(num_runs):
            random = Random(seed)
            moment = list(Moment)[seed % len(Moment)]
            victim = random.choice(chaos.names("prefill"))
            texts = random.sample(TEXTS, 3)
            hurting = kill_at(chaos, moment, victim, texts, random)
            answers = chaos.with_successor(hurting, "prefill", f"prefill-{seed + 2}")
            for text, answer in zip(texts, answers, strict=True):
                assert_greedy(text, answer, told=f"run {seed}, {moment}")
                assert answer.attempt == 1, "the decode worker lives: it is not the router's business"
            hurt[moment] += any(went_on(answer) for answer in answers)
            chaos.runner.run(chaos.cluster.assert_all_free())
    per_moment = [len(range(index, num_runs, len(Moment))) for index in range(len(Moment))]
    assert hurt[Moment.BEFORE] == per_moment[0]
    assert hurt[Moment.DURING] and hurt[Moment.AFTER]


def test_without_a_spare_the_rest_is_computed_by_decode() -> None:
    """From the blocks that arrived, not from the beginning."""
    with running_chaos({"router.local_prefill": "fallback"}) as chaos:
        text, answer = chaos.runner.run(kill_with_blocks_missing(chaos, "prefill-0"))
        assert_greedy(text, answer)
        assert 0 < answer.route.recomputed_tokens < len(text)
        assert answer.route.blocks * BLOCK_SIZE + answer.route.recomputed_tokens == len(text)
        assert chaos.runner.run(chaos.cluster.total("sluice_engine_local_prefills_total", "decode")) == 1
        chaos.runner.run(chaos.cluster.assert_all_free())
        [later] = chaos.runner.run(chaos.together([LATER]))
        assert_greedy(LATER, later)
        assert later.route.local_prefill, "the fallback is visible"


@pytest.mark.parametrize("moment", Moment)
def test_where_local_prefill_is_never_allowed_the_request_waits_for_the_successor(moment: Moment) -> None:
    with running_chaos({"router.local_prefill": "never"}) as chaos:
        texts = list(TEXTS[:2])
        hurting = kill_at(chaos, moment, "prefill-0", texts, Random(0))
        answers = chaos.with_successor(hurting, "prefill", "prefill-1")
        for text, answer in zip(texts, answers, strict=True):
            assert_greedy(text, answer)
            assert not answer.route.local_prefill and not answer.route.recomputed_tokens
        assert any(answer.route.prefill.name == "prefill-1" for answer in answers)
        assert chaos.runner.run(chaos.cluster.total("sluice_engine_local_prefills_total", "decode")) == 0
        chaos.runner.run(chaos.cluster.assert_all_free())

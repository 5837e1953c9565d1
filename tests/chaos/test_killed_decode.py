"""SIGKILL of a decode worker in the middle of streams: they go on elsewhere, nothing lost, doubled or resampled.

With --full twenty deaths; `tests.chaos` makes more of them, at moments nobody chose.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random

import pytest

from cluster.errors import WorkerFailed
from cluster.request import SamplingParams
from router.flight import MAX_DEATHS
from tests.support import poisoned_worker
from tests.support.chaos import GREEDY, Chaos, is_greedy, prompts, running_chaos
from tests.support.poisoned_worker import POISON

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(180)]

NUM_RUNS, NUM_SHORT_RUNS = 20, 5
TEXTS = prompts(6, 40, 120)
NUM_TOKENS = 96
PLAIN = replace(GREEDY, max_tokens=NUM_TOKENS)
SEEDED = replace(PLAIN, temperature=0.8, top_p=0.95, top_k=50)


async def stream(
    chaos: Chaos, text: tuple[int, ...], sampling: SamplingParams, kill_at: int | None = None
) -> tuple[tuple[int, ...], int]:
    """All tokens and the number of attempts. Kills the decode worker that serves it after `kill_at` tokens."""
    tokens: list[int] = []
    attempt = 0
    async for delta in chaos.deltas(text, sampling):
        assert delta.first_index == len(tokens), "a token was lost or doubled"
        tokens += delta.token_ids
        attempt = delta.attempt
        if kill_at is not None and len(tokens) >= kill_at:
            kill_at = None
            await chaos.cluster.kill(delta.plan.decode.name)
    return tuple(tokens), attempt


def test_killed_at_any_token_streams_go_on_elsewhere(request: pytest.FixtureRequest) -> None:
    num_runs = NUM_RUNS if request.config.getoption("full") else NUM_SHORT_RUNS
    seeds = [replace(SEEDED, seed=seed) for seed in range(len(TEXTS))]
    with running_chaos(decode=2) as chaos:
        undisturbed = chaos.runner.run(chaos.together(TEXTS, seeds))
        drawn = [tuple(answer.token_ids) for answer in undisturbed]
        assert len({token for tokens in drawn for token in tokens}) >= 100
        num_moved = 0
        for run in range(num_runs):
            random = Random(run)
            chosen = random.sample(range(len(TEXTS)), 4)
            sampled = random.sample(chosen, 2)
            hurt = random.choice(chosen)
            kill_at = random.randint(1, NUM_TOKENS // 2)
            replays = chaos.cluster.metrics.value("sluice_ingress_replays_total")

            async def together(
                chosen: list[int] = chosen, sampled: list[int] = sampled, hurt: int = hurt, kill_at: int = kill_at
            ) -> list[tuple[tuple[int, ...], int]]:
                return await asyncio.gather(
                    *(
                        stream(
                            chaos,
                            TEXTS[index],
                            seeds[index] if index in sampled else PLAIN,
                            kill_at if index == hurt else None,
                        )
                        for index in chosen
                    )
                )

            results = chaos.with_successor(together(), "decode", f"decode-{run + 2}")
            for index, (tokens, _) in zip(chosen, results, strict=True):
                if index in sampled:
                    assert tokens == drawn[index], f"run {run}: resampled"
                else:
                    assert len(tokens) == NUM_TOKENS and is_greedy(TEXTS[index], tokens), f"run {run}"
            moved = sum(attempt > 1 for _, attempt in results)
            assert chaos.cluster.metrics.value("sluice_ingress_replays_total") - replays == moved
            num_moved += moved
            chaos.runner.run(chaos.cluster.assert_all_free())
        assert num_moved > num_runs, "no bystander was moved"  # on a busy machine a stream may end before its death


def test_a_request_under_which_two_workers_died_is_given_up() -> None:
    """Whoever is to serve it dies of it, before it can emit so much that something else is blamed. Others are not
    touched by its end."""
    with running_chaos(decode=3, main=poisoned_worker.serve) as chaos:

        async def poisoned() -> None:
            with pytest.raises(WorkerFailed, match=POISON):
                [_ async for _ in chaos.deltas(TEXTS[0], request_id=POISON)]
            await chaos.cluster.until(lambda: len(chaos.dead()) >= MAX_DEATHS, "they have died")
            assert {name.partition("-")[0] for name in chaos.dead()} == {"decode"}
            for name in chaos.dead():
                await chaos.cluster.kill(name)

        chaos.runner.run(poisoned())
        assert len(chaos.names("decode")) == 1, "it was tried again"
        tokens, attempt = chaos.runner.run(stream(chaos, TEXTS[1], PLAIN))
        assert is_greedy(TEXTS[1], tokens) and attempt == 1
        chaos.runner.run(chaos.cluster.assert_all_free())

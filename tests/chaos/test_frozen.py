"""SIGSTOP: a process that is there and silent. Heartbeats notice; when it wakes up it does no harm."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from cluster.protos import worker_pb2 as pb
from tests.support.chaos import GREEDY, Chaos, assert_greedy, is_greedy, prompts, running_chaos
from tests.support.plain_cluster import Answer

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(180)]

TEXTS = prompts(6, 200, 400, seed=2)
QUICK = {"words.heartbeat_s": 0.1, "words.heartbeat_timeout_s": 0.8}
LONG = replace(GREEDY, max_tokens=96)


@pytest.fixture(scope="module")
def chaos() -> Iterator[Chaos]:
    with running_chaos(QUICK, prefill=2, decode=2) as chaos:
        yield chaos


async def rejoin(chaos: Chaos, name: str) -> None:
    """Thaws a worker and waits until it serves again, the same incarnation."""
    before = chaos.member(name)
    chaos.thaw(name)
    await chaos.cluster.until_warm()
    await chaos.cluster.assert_all_free()
    assert chaos.member(name) == before and chaos.cluster.workers[name].process.is_alive()


def test_a_frozen_source_is_left_for_the_spare(chaos: Chaos) -> None:
    async def frozen() -> list[Answer]:
        chaos.freeze("prefill-0")
        try:
            return await chaos.together(TEXTS[:4], LONG)
        finally:
            await rejoin(chaos, "prefill-0")

    answers = chaos.runner.run(frozen())
    for text, answer in zip(TEXTS, answers, strict=False):
        assert_greedy(text, answer, LONG.max_tokens)
        assert answer.route.prefill.name == "prefill-1"
    assert any(answer.route.spare_used for answer in answers)
    after = chaos.runner.run(chaos.together(TEXTS[:4], LONG))
    assert {answer.route.prefill.name for answer in after} == {"prefill-0", "prefill-1"}


def test_streams_of_a_frozen_decode_worker_go_on_elsewhere(chaos: Chaos) -> None:
    """It freezes in the middle of streams; what it says when it wakes is heard by nobody."""

    async def follow(text: tuple[int, ...], freeze_at: int | None) -> tuple[tuple[int, ...], int]:
        tokens: list[int] = []
        attempt = 0
        async for delta in chaos.deltas(text, LONG):
            assert delta.first_index == len(tokens)
            tokens += delta.token_ids
            attempt = delta.attempt
            if freeze_at is not None and len(tokens) >= freeze_at:
                freeze_at = None
                frozen.append(delta.plan.decode.name)
                chaos.freeze(delta.plan.decode.name)
        return tuple(tokens), attempt

    async def together() -> list[tuple[tuple[int, ...], int]]:
        try:
            streams = (follow(text, 20 if index == 0 else None) for index, text in enumerate(TEXTS))
            return await asyncio.gather(*streams)
        finally:
            await rejoin(chaos, frozen[0])

    frozen: list[str] = []
    replays = chaos.cluster.metrics.value("sluice_ingress_replays_total")
    results = chaos.runner.run(together())
    for text, (tokens, _) in zip(TEXTS, results, strict=True):
        assert len(tokens) == LONG.max_tokens and is_greedy(text, tokens)
    assert results[0][1] == 2
    assert chaos.cluster.metrics.value("sluice_ingress_replays_total") > replays


def test_a_sink_frozen_in_the_middle_of_reads_wakes_up_to_blocks_that_were_reused() -> None:
    """It sleeps for longer than 2T; its source quarantined the blocks, freed them and wrote other prompts there."""
    settings = {**QUICK, "kv.num_blocks": 80, "router.worker_wait_s": 30.0}
    with running_chaos(settings, prefill=1, decode=2) as chaos:
        watch = chaos.watch

        async def scene() -> list[Answer]:
            reading = chaos.ask(TEXTS[:4], LONG)
            for sink in ("decode-0", "decode-1"):
                await watch.until(sink, lambda load: load.num_pulling > 0, "asked")
            chaos.freeze("decode-0")
            quarantined = await watch.until(
                "prefill-0", lambda load: load.groups[0].quarantined > 0 or not load.num_leases, "the lease ends"
            )
            reused.append(quarantined.groups[0].quarantined)
            await watch.until("prefill-0", lambda load: load.groups[0].quarantined == 0, "2T have passed")
            for text in prompts(6, 300, 400, seed=9):  # all blocks of the source are written again
                assert_greedy(text, await chaos.cluster.ask(list(text), replace(GREEDY, max_tokens=4)), 4)
            chaos.thaw("decode-0")
            return await asyncio.gather(*reading)

        reused: list[int] = []
        answers = chaos.runner.run(scene())
        for text, answer in zip(TEXTS, answers, strict=False):
            assert_greedy(text, answer, LONG.max_tokens)
        assert reused[0] > 0, "nothing was leased to the frozen sink"
        chaos.runner.run(chaos.cluster.until_warm())
        after = chaos.runner.run(chaos.together(TEXTS))  # through blocks that late reads may have touched
        for text, answer in zip(TEXTS, after, strict=True):
            assert_greedy(text, answer)
        chaos.runner.run(chaos.cluster.assert_all_free())
        loads: dict[str, pb.AdminResponse] = chaos.runner.run(chaos.cluster.router.load())
        assert len(loads) == 3

"""Samples of one prompt are placed beside the first of them, where that is possible."""

from __future__ import annotations

import asyncio
from typing import Any

from cluster.protos import worker_pb2 as pb
from cluster.words_thread import WordsThread
from router.flight import TokenDelta
from tests.support.routing import PROMPT, Desk, Stage, desk, eventually, gather, play, wait_for
from tests.support.scripted_worker import FOREVER, Fail, Say, ScriptedWorker, Wait, all_tokens

NUM_FOLLOWERS = 4


def together(at: Desk) -> list[asyncio.Task[tuple[list[int], TokenDelta]]]:
    """A leader and its followers, in that order."""
    leader = at.request()
    others = [at.request(leader_id=leader.request_id) for _ in range(NUM_FOLLOWERS)]
    return [asyncio.create_task(gather(at.router, each)) for each in (leader, *others)]


def leaders(worker: ScriptedWorker) -> list[str]:
    return [submit.leader_id for submit in worker.submits]


def test_followers_run_on_the_plan_of_their_leader(words: WordsThread, stage: Stage) -> None:
    sources = [stage.prefill(f"prefill-{i}") for i in range(3)]
    workers = [stage.decode(f"decode-{i}", sources=sources) for i in range(3)]

    async def scene() -> None:
        async with desk(words) as at:
            await at.connect(*sources, *workers)
            answers = await asyncio.gather(*together(at))
            assert all(ids == all_tokens(PROMPT, 8) for ids, _ in answers)
            plans = [last.plan for _, last in answers]
            assert all(plan == plans[0] for plan in plans)
            [used] = [worker for worker in workers if worker.submits]
            leader = used.submits[0].key.request_id
            assert leaders(used) == ["", *[leader] * NUM_FOLLOWERS]
            alone = at.request(leader_id=leader)  # which has ended
            await gather(at.router, alone)

    play(scene)


async def first_used(workers: list[ScriptedWorker]) -> tuple[ScriptedWorker, ScriptedWorker]:
    """Of two: the one that has a request, and the other one."""
    await eventually(lambda: any(worker.submits for worker in workers))
    [used] = [worker for worker in workers if worker.submits]
    [other] = [worker for worker in workers if worker is not used]
    return used, other


def test_they_move_together_when_their_worker_is_lost(words: WordsThread, stage: Stage) -> None:
    workers = [stage.decode(f"decode-{i}", Say(2), Wait()) for i in range(2)]

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(*workers)
            tasks = together(at)
            used, other = await first_used(workers)
            await wait_for(used, lambda w: len(w._held) == NUM_FOLLOWERS + 1)
            other.script = [FOREVER]
            used.stop()
            answers = await asyncio.gather(*tasks)
            assert all(ids == all_tokens(PROMPT, 8) for ids, _ in answers)
            assert [last.attempt for _, last in answers] == [2] * (NUM_FOLLOWERS + 1)
            leader = other.submits[0].key.request_id
            assert leaders(other) == ["", *[leader] * NUM_FOLLOWERS]

    play(scene)


def test_equal_prompts_that_arrive_together_are_read_once(words: WordsThread, stage: Stage) -> None:
    """As long as the first one has no token, and where both go to one worker."""
    worker = stage.decode("decode-0", Wait(), FOREVER)

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(worker)

            def ask(**options: Any) -> asyncio.Task[tuple[list[int], TokenDelta]]:
                return asyncio.create_task(gather(at.router, at.request(**options)))

            tasks = [ask(), ask()]
            await eventually(lambda: len(worker.submits) == 2)
            unlike: list[dict[str, Any]] = [{"prompt_token_ids": (5, 4, 3, 2, 1)}, {"prompt_token_ids": PROMPT[:3]}]
            tasks += [ask(**options) for options in [*unlike, {"cache_salt": "another"}]]
            await eventually(lambda: len(worker.submits) == 5)
            first = worker.submits[0].key.request_id
            assert leaders(worker) == ["", first, "", "", ""]
            worker.go_on()
            await asyncio.gather(*tasks)
            worker.script = [Say(1), Wait(), FOREVER]
            begun = at.router.generate(at.request())
            await anext(begun)
            late = ask()
            await eventually(lambda: len(worker.submits) == 7)
            assert leaders(worker)[5:] == ["", ""]
            await begun.aclose()
            worker.go_on()
            await late

    play(scene)


def test_a_follower_that_was_turned_away_goes_elsewhere_alone(words: WordsThread, stage: Stage) -> None:
    workers = [stage.decode(f"decode-{i}", Say(1), Wait(), FOREVER) for i in range(2)]

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(*workers)
            leader = at.request()
            first = asyncio.create_task(gather(at.router, leader))
            used, other = await first_used(workers)
            used.script, other.script = [Fail(pb.BUSY)], [FOREVER]
            ids, last = await gather(at.router, at.request(leader_id=leader.request_id))
            assert ids == all_tokens(PROMPT, 8) and last.plan.decode.name == other.name
            assert leaders(used)[1] == leader.request_id
            used.go_on()
            assert (await first)[0] == ids

    play(scene)

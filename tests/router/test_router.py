"""The router over real sessions: plans, waiting, limits, deadlines, cancels, drains."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import aclosing
from typing import Any

import pytest

from cluster.errors import (
    Busy,
    DeadlineExceeded,
    InvalidRequest,
    NoWorker,
)
from cluster.hashing import block_hashes, chain_root, split
from cluster.membership import MemberState
from cluster.protos import worker_pb2 as pb
from cluster.request import FinishReason, RequestKey
from cluster.words_thread import WordsThread
from tests.support.routing import DEADLINE_S, PROMPT, Desk, Stage, desk, eventually, gather, play, wait_for
from tests.support.scripted_worker import (
    FOREVER,
    Say,
    Stop,
    Wait,
    all_tokens,
    membership,
)


def test_one_request_from_plan_to_route(words: WordsThread, stage: Stage) -> None:
    prefill = stage.prefill()
    decode = stage.decode(sources=[prefill])

    async def scene() -> None:
        async with desk(words) as at:
            await at.connect(prefill, decode)
            request = at.request(priority=3)
            ids, last = await gather(at.router, request)
            assert ids == all_tokens(PROMPT, 8)
            assert last.finish is FinishReason.LENGTH and last.attempt == 1
            assert last.route is not None and last.route.prefill.incarnation == prefill.incarnation
            (submit,) = decode.submits
            assert RequestKey.of(submit.key) == (request.request_id, 1)
            assert submit.plan == last.plan.wire()
            assert split(submit.block_hashes) == block_hashes(chain_root(b"h" * 16), PROMPT, 4)
            assert 0 < submit.deadline_ms <= DEADLINE_S * 1000
            assert (submit.priority, list(submit.prompt_token_ids)) == (3, list(PROMPT))
            assert prefill.submits == [] and decode.cancels == [] and at.router.num_open == 0

    play(scene)


def test_a_large_prompt_arrives_whole(words: WordsThread, stage: Stage) -> None:
    decode = stage.decode()
    prompt = tuple(range(100_000))

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(decode)
            ids, _ = await gather(at.router, at.request(prompt_token_ids=prompt))
            assert ids == all_tokens(prompt, 8)
            assert tuple(decode.submits[0].prompt_token_ids) == prompt

    play(scene)


def test_closing_the_stream_cancels(words: WordsThread, stage: Stage) -> None:
    decode = stage.decode("decode-0", Say(2), Wait(), FOREVER)

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(decode)
            request = at.request()
            async with aclosing(at.router.generate(request)) as deltas:
                await anext(deltas)
            await wait_for(decode, lambda w: w.cancels == [RequestKey(request.request_id, 1)])
            task = asyncio.create_task(gather(at.router, at.request()))
            await wait_for(decode, lambda w: len(w.submits) == 2)
            task.cancel()
            await wait_for(decode, lambda w: len(w.cancels) == 2)
            assert at.router.num_open == 0

    play(scene)


def test_a_deadline_ends_the_request_and_tells_the_worker(words: WordsThread, stage: Stage) -> None:
    decode = stage.decode("decode-0", Say(2), Wait())

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(decode)
            got: list[int] = []
            with pytest.raises(DeadlineExceeded, match=r"after 0\.2 s, 2 tokens were generated"):
                async for delta in at.router.generate(at.request(deadline_s=0.2)):
                    got += delta.token_ids
            assert got == all_tokens(PROMPT, 2)
            await wait_for(decode, lambda w: len(w.cancels) == 1)
            assert 0 < decode.submits[0].deadline_ms <= 200

    play(scene)


def test_a_request_waits_for_a_worker_but_not_for_ever(words: WordsThread, stage: Stage) -> None:
    decode = stage.decode()

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            waiting = asyncio.create_task(gather(at.router, at.request()))
            await eventually(lambda: at.router.num_open == 1)
            await at.connect(decode)
            ids, _ = await waiting
            assert ids == all_tokens(PROMPT, 8)
        async with desk(words, worker_wait_s=0.05) as at:
            with pytest.raises(NoWorker, match=r"no decode worker is ready \(waited 0.05 s\); retry later"):
                await gather(at.router, at.request())

    play(scene)


def test_only_warm_pairs_are_planned(words: WordsThread, stage: Stage) -> None:
    prefill, decode = stage.prefill(), stage.decode()

    async def scene() -> None:
        async with desk(words, local_prefill="never") as at:
            await at.connect(prefill, decode, ready=False)
            waiting = asyncio.create_task(gather(at.router, at.request()))
            await eventually(lambda: at.router.num_open == 1)
            assert decode.submits == []
            decode.warm(prefill)
            ids, last = await waiting
            assert ids == all_tokens(PROMPT, 8) and last.plan.prefill.name == "prefill-0"
            assert at.router.ready()

    play(scene)


def test_the_fallback_is_counted_and_not_ready_before_it_was_warm(words: WordsThread, stage: Stage) -> None:
    prefill, decode = stage.prefill(), stage.decode()

    def local_plans(at: Desk) -> float:
        return at.metrics.value("sluice_ingress_local_plans_total", {"reason": "no_source"})

    async def scene() -> None:
        async with desk(words, local_prefill="fallback") as at:
            await at.connect(prefill, decode, ready=False)
            await gather(at.router, at.request())
            assert local_plans(at) == 1 and not at.router.ready()
            assert at.router.why_not_ready() == "no prefill worker is warm yet"
            decode.warm(prefill)
            await eventually(at.router.ready)
            _, last = await gather(at.router, at.request())
            assert last.plan.prefill.name == "prefill-0" and last.plan.local_prefill_allowed
            prefill.stop()
            await eventually(lambda: at.num_sessions == 1)
            assert at.router.ready()  # it was as configured once: going on locally is what a fallback is for
            await gather(at.router, at.request())
            assert local_plans(at) == 2

    play(scene)


def test_draining_workers_get_nothing_new_and_finish_what_they_have(words: WordsThread, stage: Stage) -> None:
    draining, other = stage.decode("decode-0", Say(2), Wait(), FOREVER), stage.decode("decode-1")
    other.load.num_running = 1

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(draining, other)
            open_one = asyncio.create_task(gather(at.router, at.request()))
            await wait_for(draining, lambda w: len(w._held) == 1)
            draining.state = MemberState.DRAINING
            at.router.update_membership(membership(draining, other, version=2))
            await at.router.load()  # answered later than the router has heard that
            _, last = await gather(at.router, at.request())
            assert last.plan.decode.name == "decode-1"
            draining.go_on()
            ids, last = await open_one
            assert ids == all_tokens(PROMPT, 8) and last.plan.decode.name == "decode-0"
            draining.state = MemberState.READY
            at.router.update_membership(membership(draining, other, version=3))
            draining.say_goodbye()
            other.report(pb.LoadReport(num_running=7))
            await at.router.load()  # answered after both frames: they were heard
            _, last = await gather(at.router, at.request())
            assert last.plan.decode.name == "decode-1"

    play(scene)


def test_requests_spread_over_workers_between_reports(words: WordsThread, stage: Stage) -> None:
    workers = [stage.decode(f"decode-{i}", Wait()) for i in range(3)]

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(*workers)
            tasks = [asyncio.create_task(gather(at.router, at.request(max_tokens=2))) for _ in range(9)]
            for worker in workers:
                await wait_for(worker, lambda w: len(w.submits) == 3)
                worker.script = [FOREVER]
                worker._held = [(attempt, [FOREVER]) for attempt, _ in worker._held]
                worker.go_on()
            await asyncio.gather(*tasks)

    play(scene)


def test_too_many_open_requests_are_refused_at_once(words: WordsThread, stage: Stage) -> None:
    decode = stage.decode("decode-0", Wait(), FOREVER)

    async def scene() -> None:
        async with desk(words, max_requests=1, local_prefill="always") as at:
            await at.connect(decode)
            first = asyncio.create_task(gather(at.router, at.request()))
            await wait_for(decode, lambda w: len(w._held) == 1)
            with pytest.raises(Busy, match="the limit is 1"):
                await gather(at.router, at.request())
            decode.go_on()
            await first
            assert len(decode.submits) == 1

    play(scene)


def test_a_salt_has_a_hash_chain_of_its_own(words: WordsThread, stage: Stage) -> None:
    decode = stage.decode("decode-0")

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(decode)
            for cache_salt in ("", "ann"):
                await gather(at.router, at.request(cache_salt=cache_salt))
            plain, salted = decode.submits
            root = chain_root(b"h" * 16, salt="ann")
            assert plain.chain_root == b"" and salted.chain_root == root
            assert split(plain.block_hashes) == block_hashes(chain_root(b"h" * 16), PROMPT, 4)
            assert split(salted.block_hashes) == block_hashes(root, PROMPT, 4)
            assert b"ann" not in salted.SerializeToString()

    play(scene)


def test_a_request_id_is_used_once_at_a_time(words: WordsThread, stage: Stage) -> None:
    decode = stage.decode("decode-0", Wait(), Stop())

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(decode)
            request = at.request()
            first = asyncio.create_task(gather(at.router, request))
            await wait_for(decode, lambda w: len(w._held) == 1)
            with pytest.raises(InvalidRequest, match="is in use"):
                await gather(at.router, request)
            decode.go_on()
            assert (await first)[1].finish is FinishReason.STOP

    play(scene)


def test_admin_asks_every_worker(words: WordsThread, stage: Stage) -> None:
    workers = [stage.decode(f"decode-{i}") for i in range(2)]
    workers[0].load.num_running = 4

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(*workers)
            loads = await at.router.load()
            assert {key: answer.load.num_running for key, answer in loads.items()} == {
                workers[0].incarnation: 4,
                workers[1].incarnation: 0,
            }
            await at.router.clear_cache()
            assert [worker.num_clears for worker in workers] == [1, 1]

    play(scene)


def test_stopping_ends_what_is_open(words: WordsThread, stage: Stage) -> None:
    decode = stage.decode("decode-0", Say(1), Wait())

    async def scene() -> None:
        ended: Awaitable[Any]
        async with desk(words, local_prefill="always") as at:
            await at.connect(decode)
            ended = asyncio.create_task(gather(at.router, at.request()))
            await wait_for(decode, lambda w: len(w._held) == 1)
        with pytest.raises(NoWorker, match="this ingress replica stops"):
            await ended
        await wait_for(decode, lambda w: w._sessions == [])  # which ends its requests there

    play(scene)

"""Whatever scripted workers do to a request, its client gets each token once, in order."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import (
    Busy,
    InvalidRequest,
    NoWorker,
    RequestError,
    RequestTooLong,
    WorkerFailed,
)
from cluster.hashing import block_hashes, chain_root, split
from cluster.protos import worker_pb2 as pb
from cluster.request import FinishReason
from cluster.words_thread import WordsThread
from tests.support.routing import PROMPT, Stage, desk, eventually, gather, play, wait_for
from tests.support.scripted_worker import (
    FOREVER,
    Action,
    Break,
    Die,
    Fail,
    Older,
    Repeat,
    Say,
    ScriptedWorker,
    Skip,
    Wait,
    all_tokens,
    membership,
)

deeds = st.one_of(
    st.builds(Say, st.integers(1, 4), st.booleans()),
    st.builds(Repeat, st.integers(1, 4)),
    st.just(Older()),
    st.just(Skip()),
)
ends = st.sampled_from([Break(), Die(), Fail(pb.BUSY), Fail(pb.INTERNAL), FOREVER, FOREVER, FOREVER])
scripts = st.lists(st.tuples(st.lists(deeds, max_size=5), ends), min_size=3, max_size=3)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(scripts=scripts)
def test_whatever_the_workers_do_each_index_comes_once(
    words: WordsThread, scripts: list[tuple[list[Action], Action]]
) -> None:
    """Three workers, each with a script of words said, repeated, skipped, and an end: break, die, fail or finish."""
    workers = [ScriptedWorker(f"decode-{i}", script=[*script, end]) for i, (script, end) in enumerate(scripts)]

    async def scene() -> None:
        async with desk(words, local_prefill="always", max_attempts=4, worker_wait_s=0.4) as at:
            await at.connect(*workers)
            ids: list[int] = []
            finish = None
            error: RequestError | None = None
            try:
                async for delta in at.router.generate(at.request(max_tokens=12)):
                    assert delta.first_index == len(ids)
                    ids += delta.token_ids
                    finish = delta.finish
            except RequestError as raised:
                error = raised
            expected = all_tokens(PROMPT, 12)
            assert ids == expected[: len(ids)]
            if error is None:
                assert finish is FinishReason.LENGTH and ids == expected
            else:
                assert isinstance(error, WorkerFailed | Busy | NoWorker), error
            for submit in (submit for worker in workers for submit in worker.submits):
                emitted = list(submit.emitted_token_ids)
                assert emitted == expected[: len(emitted)]

    try:
        play(scene)
    finally:
        for worker in workers:
            worker.stop()


def test_a_dead_decode_worker_is_replayed_elsewhere(words: WordsThread, stage: Stage) -> None:
    prefill = stage.prefill()
    dying = stage.decode("decode-0", Say(3), Die(), sources=[prefill])
    other = stage.decode("decode-1", sources=[prefill])
    other.load.num_running = 1  # the dying one is chosen first

    async def scene() -> None:
        async with desk(words) as at:
            await at.connect(prefill, dying, other)
            ids, last = await gather(at.router, at.request())
            assert ids == all_tokens(PROMPT, 8) and last.attempt == 2
            (submit,) = other.submits
            assert list(submit.emitted_token_ids) == ids[:3]
            known = [*PROMPT, *ids[:3]]
            assert split(submit.block_hashes) == block_hashes(chain_root(b"h" * 16), known, 4)
            assert at.metrics.value("sluice_ingress_replays_total") == 1
            assert at.failures("peer_lost") == 1

    play(scene)


def test_broken_is_not_dead(words: WordsThread, stage: Stage) -> None:
    """With nobody else, the request goes back to the worker whose session broke, once it is dialed again."""
    decode = stage.decode("decode-0", Say(2), Break())

    async def scene() -> None:
        async with desk(words, local_prefill="always", max_attempts=4) as at:
            await at.connect(decode)
            ids, last = await gather(at.router, at.request())
            assert ids == all_tokens(PROMPT, 8) and last.attempt == 4

    play(scene)


def test_a_request_that_lost_two_workers_which_live_is_not_poisoned(words: WordsThread, stage: Stage) -> None:
    """As after a freeze of the ingress: all its sessions are broken when it wakes, and it hears of them in turn."""
    workers = [stage.decode(f"decode-{i}", Say(2), Break()) for i in range(2)]

    async def scene() -> None:
        async with desk(words, local_prefill="always", max_attempts=10) as at:
            await at.connect(*workers)
            ids, last = await gather(at.router, at.request())
            assert ids == all_tokens(PROMPT, 8) and last.attempt == 4

    play(scene)


def test_old_repeated_and_unknown_frames_are_dropped_and_counted(words: WordsThread, stage: Stage) -> None:
    decode = stage.decode("decode-0", Say(2), Repeat(2), Older(), Say(1), Repeat(1), FOREVER, sources=[])

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(decode)
            ids, _ = await gather(at.router, at.request())
            assert ids == all_tokens(PROMPT, 8)
            assert at.dropped("repeated_index") == 2
            assert at.dropped("old_attempt") == 1
            stray = pb.SequenceTokens(key=pb.RequestKey(request_id="nobody", attempt=1), token_ids=[1])
            decode._sessions[0].send(pb.Frame(step_tokens=pb.StepTokens(sequences=[stray])))
            await eventually(lambda: at.dropped("unknown_request") == 1)

    play(scene)


def test_a_gap_ends_the_attempt_not_the_request(words: WordsThread, stage: Stage) -> None:
    bad = stage.decode("decode-0", Say(2), Skip(), FOREVER)
    good = stage.decode("decode-1")
    good.load.num_running = 1

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(bad, good)
            ids, last = await gather(at.router, at.request())
            assert ids == all_tokens(PROMPT, 8) and last.attempt == 2
            await wait_for(bad, lambda w: len(w.cancels) == 1)
            assert at.failures("internal") == 1

    play(scene)


def test_busy_tries_another_then_429(words: WordsThread, stage: Stage) -> None:
    full = [stage.decode(f"decode-{i}", Fail(pb.BUSY)) for i in range(2)]
    free = stage.decode("decode-2")
    free.load.num_running = 5

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(*full, free)
            ids, last = await gather(at.router, at.request())
            assert ids == all_tokens(PROMPT, 8) and last.attempt == 3
            assert at.metrics.value("sluice_ingress_replays_total") == 0  # turned away is no replay
            at.router.update_membership(membership(*full, version=2))
            with pytest.raises(Busy, match="every worker's queue is full"):
                await gather(at.router, at.request())

    play(scene)


def test_a_poisoned_request_is_not_tried_a_third_time(words: WordsThread, stage: Stage) -> None:
    workers = [stage.decode(f"decode-{i}", Say(1), Die()) for i in range(3)]

    async def scene() -> None:
        async with desk(words, local_prefill="always", max_attempts=10) as at:
            await at.connect(*workers)
            request = at.request()
            with pytest.raises(WorkerFailed, match=f"request {request.request_id} failed on 2 workers"):
                await gather(at.router, request)
            assert sum(len(worker.submits) for worker in workers) == 2

    play(scene)


@pytest.mark.parametrize(("code", "error"), [(pb.INVALID, InvalidRequest), (pb.TOO_LONG, RequestTooLong)])
def test_the_clients_own_mistakes_are_not_tried_again(
    words: WordsThread, stage: Stage, code: pb.ErrorCode, error: type[RequestError]
) -> None:
    workers = [stage.decode(f"decode-{i}", Fail(code, "7 is odd")) for i in range(2)]

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(*workers)
            with pytest.raises(error, match="7 is odd"):
                await gather(at.router, at.request())
            assert sum(len(worker.submits) for worker in workers) == 1

    play(scene)


def test_a_member_that_left_is_dropped_and_its_requests_go_on(words: WordsThread, stage: Stage) -> None:
    leaving, other = stage.decode("decode-0", Say(2), Wait()), stage.decode("decode-1")
    other.load.num_running = 1

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(leaving, other)
            request = asyncio.create_task(gather(at.router, at.request()))
            await wait_for(leaving, lambda w: len(w._held) == 1)
            at.router.update_membership(membership(other, version=2))
            ids, last = await request
            assert ids == all_tokens(PROMPT, 8) and last.plan.decode.name == "decode-1"
            await wait_for(leaving, lambda w: w._sessions == [])

    play(scene)

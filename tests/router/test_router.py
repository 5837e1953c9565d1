"""The router over real sessions: whatever scripted workers do, a client gets each token once, in order."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.config import LimitsConfig, LogConfig, Role, RouterConfig
from cluster.errors import (
    Busy,
    DeadlineExceeded,
    InvalidRequest,
    NoWorker,
    RequestError,
    RequestTooLong,
    WorkerFailed,
)
from cluster.hashing import block_hashes, chain_root, split
from cluster.log import Log
from cluster.membership import MemberState
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import FinishReason, RequestKey, SamplingParams
from cluster.words_thread import WordsThread
from router.flight import RouterRequest, TokenDelta
from router.router import Router
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
    Stop,
    Wait,
    all_tokens,
    membership,
)
from tests.support.words import SECRET, identity, words_config

DEADLINE_S = 20.0
PROMPT = (1, 2, 3, 4, 5)
_ids = itertools.count()


@pytest.fixture(scope="module")
def words() -> Iterator[WordsThread]:
    with WordsThread(config=words_config(heartbeat_timeout_s=5.0)) as thread:
        yield thread


@pytest.fixture
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack)


class Stage:
    """Starts scripted workers and stops them at the test's end."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def prefill(self, name: str = "prefill-0", **options: Any) -> ScriptedWorker:
        return self._add(ScriptedWorker(name, roles=[Role.PREFILL], **options))

    def decode(self, name: str = "decode-0", *script: Action, **options: Any) -> ScriptedWorker:
        return self._add(ScriptedWorker(name, script=script or (FOREVER,), **options))

    def _add(self, worker: ScriptedWorker) -> ScriptedWorker:
        self._stack.callback(worker.stop)
        return worker


class Desk:
    """A started router and what a test wants of it."""

    def __init__(self, router: Router, metrics: Metrics) -> None:
        self.router = router
        self.metrics = metrics

    async def connect(self, *workers: ScriptedWorker, ready: bool = True) -> None:
        """Returns when every worker has a session and its load report was heard."""
        self.router.update_membership(membership(*workers))
        await eventually(lambda: self.num_sessions == len(workers))
        await self.router.load()  # answered after the report that each sends first
        assert self.router.ready() == ready

    @property
    def num_sessions(self) -> float:
        return self.metrics.value("sluice_words_sessions", {"peer_kind": "worker"})

    def request(self, *, max_tokens: int = 8, deadline_s: float | None = DEADLINE_S, **options: Any) -> RouterRequest:
        sampling = SamplingParams(max_tokens=max_tokens)
        options = {"prompt_token_ids": PROMPT, **options}
        return RouterRequest(request_id=f"r{next(_ids)}", sampling=sampling, deadline_s=deadline_s, **options)

    def dropped(self, reason: str) -> float:
        return self.metrics.value("sluice_words_dropped_frames_total", {"reason": reason})

    def failures(self, reason: str) -> float:
        return self.metrics.value("sluice_ingress_failures_total", {"reason": reason})


@asynccontextmanager
async def desk(
    words: WordsThread, *, max_requests: int = 64, block_size: int = 4, **options: Any
) -> AsyncIterator[Desk]:
    metrics = Metrics()
    router = Router(
        RouterConfig(**{"local_prefill": "never", "worker_wait_s": DEADLINE_S, **options}),
        LimitsConfig(max_requests=max_requests),
        words,
        identity("ingress-0", kind=pb.INGRESS),
        SECRET,
        metrics,
        Log.open("router", LogConfig(level="error")),
        block_size=block_size,
    )
    await router.start()
    try:
        yield Desk(router, metrics)
    finally:
        await router.stop()


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():
            await asyncio.sleep(0.002)


async def gather(router: Router, request: RouterRequest) -> tuple[list[int], TokenDelta]:
    """All tokens, in the order and at the indices they were delivered, and the last delta."""
    ids: list[int] = []
    async for delta in router.generate(request):
        assert delta.first_index == len(ids)
        ids += delta.token_ids
        if delta.finish is not None:
            return ids, delta
    raise AssertionError("ended without a finish")


def play(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(3 * DEADLINE_S):
            await scene()

    asyncio.run(bounded())


async def wait_for(worker: ScriptedWorker, holds: Callable[[ScriptedWorker], bool]) -> None:
    await asyncio.to_thread(worker.wait, holds)


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
        async with desk(words, local_prefill="always", max_attempts=4, worker_wait_s=1.0) as at:
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

"""Steps that raise, loops that crash, prompts that kill, deadlines and cancels: what they end, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest

from cluster.errors import DeadlineExceeded, RequestError, WorkerFailed
from cluster.protos import worker_pb2 as pb
from tests.support import faulty_worker
from tests.support.chaos import GREEDY, Chaos, assert_greedy, prompts, running_chaos
from tests.support.plain_cluster import Answer
from tests.support.raw_ingress import RawIngress
from workers.standalone import CRASHED

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

TEXTS = prompts(8, 40, 200, seed=1)
LONG = replace(GREEDY, max_tokens=200)


@pytest.fixture(scope="module")
def chaos() -> Iterator[Chaos]:
    with running_chaos({"router.local_prefill": "never"}, prefill=2, decode=1, main=faulty_worker.serve) as chaos:
        yield chaos


def members(chaos: Chaos) -> set[str]:
    return {worker.member.incarnation for worker in chaos.cluster.workers.values() if worker.member}


async def exits(chaos: Chaos, name: str) -> int | None:
    """The status with which a worker ended by itself; it is taken out of the cluster."""
    worker = chaos.cluster.workers.pop(name)
    await asyncio.to_thread(worker.process.join, 20)
    worker.pipe.close()
    return worker.process.exitcode


def test_a_step_that_raises_ends_its_own_sequences_only(chaos: Chaos) -> None:
    text = TEXTS[0]

    async def one_fails() -> tuple[Answer, RequestError]:
        open_stream = asyncio.ensure_future(chaos.cluster.ask(list(text), LONG))
        await chaos.watch.until("decode-0", lambda load: load.num_running == 1, "streaming")
        with pytest.raises(WorkerFailed, match=r"bad-step.*FloatingPointError") as failed:
            await chaos.cluster.ask([*TEXTS[1], *faulty_worker.RAISES], GREEDY, "bad-step")
        return await open_stream, failed.value

    def num_failed(pool: str) -> float:
        return chaos.runner.run(chaos.cluster.total("sluice_engine_failures_total", pool))

    before = members(chaos)
    failed_before = num_failed("prefill"), num_failed("decode")
    answer, error = chaos.runner.run(one_fails())
    assert error.status == 500
    assert (num_failed("prefill") - failed_before[0], num_failed("decode") - failed_before[1]) == (2, 1)
    assert_greedy(text, answer, LONG.max_tokens)
    chaos.runner.run(chaos.cluster.assert_all_free())
    [after] = chaos.runner.run(chaos.together([TEXTS[2]]))
    assert_greedy(TEXTS[2], after)
    assert members(chaos) == before and all(w.process.is_alive() for w in chaos.cluster.workers.values())


def test_a_prompt_that_kills_two_workers_is_not_given_to_a_third() -> None:
    # Decode would compute it where it has lost both sources otherwise: to late reads, or heartbeats, of a busy machine.
    reads = {"transfer.late_read_s": 10.0, "transfer.stuck_read_s": 20.0, "transfer.lease_s": 20.0}
    patient = {**reads, "words.heartbeat_timeout_s": 20.0, "words.step_timeout_s": 20.0}
    with running_chaos(patient, prefill=3, decode=1, main=faulty_worker.serve) as chaos:

        async def crowd() -> list[Answer]:
            """Others whose prompts are with the same sources, and the one that kills them."""
            bystanders = chaos.ask(TEXTS * 2)
            with pytest.raises(WorkerFailed, match="poison"):
                await chaos.cluster.ask([*TEXTS[1], *faulty_worker.DIES * 3], GREEDY, "poison")
            return await asyncio.gather(*bystanders)

        for text, answer in zip(TEXTS * 2, chaos.runner.run(crowd()), strict=True):
            assert_greedy(text, answer)
        chaos.runner.run(chaos.cluster.until(lambda: len(chaos.dead()) == 2, "two deaths"))
        dead = chaos.dead()
        assert all(name.startswith("prefill") for name in dead)
        statuses = [chaos.runner.run(exits(chaos, name)) for name in dead]
        assert statuses == [faulty_worker.DEAD] * 2
        [after] = chaos.runner.run(chaos.together([TEXTS[2]]))
        assert_greedy(TEXTS[2], after)
        chaos.runner.run(chaos.cluster.assert_all_free())


def test_a_crashed_loop_ends_the_process_and_its_peers_notice() -> None:
    settings = {"router.local_prefill": "never"}  # else the prompt would crash decode, too
    with running_chaos(settings, main=faulty_worker.serve) as chaos:

        async def crash() -> tuple[int | None, Answer]:
            stream = asyncio.ensure_future(chaos.cluster.ask(list(TEXTS[3]), LONG))
            await chaos.watch.until("decode-0", lambda load: load.num_running == 1, "streaming")
            poison = asyncio.ensure_future(chaos.cluster.ask([*TEXTS[1], *faulty_worker.CRASHES], GREEDY))
            status = await exits(chaos, "prefill-0")
            poison.cancel()
            await asyncio.gather(poison, return_exceptions=True)
            return status, await stream

        status, answer = chaos.runner.run(crash())
        assert status == CRASHED
        assert_greedy(TEXTS[3], answer, LONG.max_tokens)


@pytest.mark.parametrize("state", ["queued", "pulling", "running"])
def test_a_deadline_is_kept_wherever_the_request_is(chaos: Chaos, state: str) -> None:
    """Queued: no blocks are left for it. Pulling: its source is frozen. Running: it is long."""
    name = f"late-{state}"

    async def late() -> None:
        busy: list[asyncio.Task[Answer]] = []
        match state:
            case "queued":
                busy = chaos.ask([text[:40] for text in TEXTS] * 4, replace(GREEDY, max_tokens=300))
                await chaos.watch.until("decode-0", lambda load: load.num_running >= 16, "full")
            case "pulling":
                chaos.freeze("prefill-0")
                chaos.freeze("prefill-1")
        sampling = replace(GREEDY, max_tokens=300)
        try:
            with pytest.raises(DeadlineExceeded, match=r"deadline"):
                async for _ in chaos.cluster.stream(list(TEXTS[4]), sampling, name, deadline_s=0.2):
                    continue
        finally:
            for each in ("prefill-0", "prefill-1"):
                chaos.thaw(each)
            for task in busy:
                task.cancel()
            await asyncio.gather(*busy, return_exceptions=True)

    chaos.runner.run(late())
    chaos.runner.run(chaos.cluster.until_warm())
    chaos.runner.run(chaos.cluster.assert_all_free())


@pytest.mark.parametrize("state", ["queued", "pulling", "prefilling", "running"])
def test_a_worker_keeps_deadlines_by_its_own_clock(chaos: Chaos, state: str) -> None:
    """An ingress that does not: the remaining time travels with the request, and what ends it says so."""

    async def late() -> pb.SequenceTokens:
        decode, prefill = chaos.member("decode-0"), chaos.member("prefill-0")
        long = replace(GREEDY, max_tokens=300)
        num_busy = {"queued": 40, "prefilling": 6}.get(state, 0)
        busy = [await ingress.submit(decode, prefill, TEXTS[i % len(TEXTS)], long) for i in range(num_busy)]
        if state == "pulling":
            chaos.freeze("prefill-0")
        deadline_ms = {"running": 300}.get(state, 60)
        name = await ingress.submit(decode, prefill, TEXTS[4], long, deadline_ms)
        end = await ingress.end_of(name)
        chaos.thaw("prefill-0")
        for each in busy:
            ingress.cancel(decode, each)
        return end

    ingress = RawIngress(chaos.cluster.words)
    try:
        end = chaos.runner.run(late())
    finally:
        ingress.stop()
    assert end.failure.code == pb.DEADLINE, end
    assert "deadline" in end.failure.message
    chaos.runner.run(chaos.cluster.until_warm())
    chaos.runner.run(chaos.cluster.assert_all_free())


def test_cancels_in_every_state_with_deaths_between_leave_nothing(chaos: Chaos) -> None:
    """Waiting, first chunk, last chunk, first token, mid-transfer, running: they all end in the same place."""
    random = Random(3)
    texts = [random.choice(TEXTS) for _ in range(60)]

    async def one(text: tuple[int, ...]) -> Answer | None:
        task = asyncio.ensure_future(chaos.cluster.ask(list(text), GREEDY))
        for _ in range(random.choice([0, 1, 5, 20, 60, 200, 800])):
            await asyncio.sleep(0)
        if random.random() < 0.2:
            return await task
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None

    async def storm() -> list[Answer | None]:
        requests = [asyncio.ensure_future(one(text)) for text in texts[:30]]
        await chaos.watch.until("decode-0", lambda load: load.num_running > 0, "streaming")
        await chaos.cluster.kill("prefill-1")
        requests += [asyncio.ensure_future(one(text)) for text in texts[30:]]
        await chaos.cluster.replace("prefill-1")
        return await asyncio.gather(*requests)

    answers = chaos.runner.run(storm())
    finished = [(text, answer) for text, answer in zip(texts, answers, strict=True) if answer is not None]
    assert finished and len(finished) < len(texts)
    for text, answer in finished:
        assert_greedy(text, answer)
    chaos.runner.run(chaos.cluster.assert_all_free())

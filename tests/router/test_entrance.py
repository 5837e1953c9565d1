"""The limits of one router, over real sessions: who waits for its turn, and who is refused when it comes."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import Busy, DeadlineExceeded, NoWorker
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.words_thread import WordsThread
from tests.support.routing import Stage, desk, eventually, gather, play, wait_for
from tests.support.scripted_worker import FOREVER, Wait, all_tokens


def waiting(metrics: Metrics) -> float:
    return metrics.value("sluice_ingress_queued_requests")


def test_requests_wait_for_their_turn(words: WordsThread, stage: Stage) -> None:
    decode = stage.decode("decode-0", Wait(), FOREVER)

    async def scene() -> None:
        async with desk(words, max_requests=1, max_queued=3, local_prefill="always") as at:
            await at.connect(decode)
            first = asyncio.create_task(gather(at.router, at.request()))
            await wait_for(decode, lambda w: len(w._held) == 1)
            wanted = [at.request(client="ann"), at.request(client="ann"), at.request(client="bob", priority=-9)]
            later = [asyncio.create_task(gather(at.router, request)) for request in wanted]
            await eventually(lambda: waiting(at.metrics) == 3)
            with pytest.raises(Busy, match="and 3 wait, the limit of which is 3") as refused:
                await gather(at.router, at.request())
            assert refused.value.limit == "queue_full"
            assert at.metrics.value("sluice_ingress_rejections_total", {"limit": "queue_full"}) == 1
            for number in range(2, 5):
                decode.go_on()
                await wait_for(decode, lambda w, number=number: len(w.submits) == number and len(w._held) == 1)
            decode.go_on()
            for task, request in zip(later, wanted, strict=True):
                assert (await task)[0] == all_tokens(request.prompt_token_ids, 8)
            await first
            assert at.router.num_open == waiting(at.metrics) == 0
            assert [submit.key.request_id for submit in decode.submits[1:]] == [
                wanted[index].request_id
                for index in (0, 1, 2)  # a quantum holds both of ann's: bob's turn comes after it
            ]

    play(scene)


def test_a_deadline_passes_while_waiting(words: WordsThread, stage: Stage) -> None:
    decode = stage.decode("decode-0", Wait(), FOREVER)

    async def scene() -> None:
        async with desk(words, max_requests=1, max_queued=2, local_prefill="always") as at:
            await at.connect(decode)
            first = asyncio.create_task(gather(at.router, at.request()))
            await wait_for(decode, lambda w: len(w._held) == 1)
            with pytest.raises(DeadlineExceeded, match=r"after 0.05 s, 0 tokens were generated"):
                await gather(at.router, at.request(deadline_s=0.05))
            gone = asyncio.create_task(gather(at.router, at.request()))
            await eventually(lambda: waiting(at.metrics) == 1)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            assert waiting(at.metrics) == 0
            decode.go_on()
            await first
            assert len(decode.submits) == 1 and at.router.num_open == 0

    play(scene)


def test_a_router_that_stops_ends_those_that_wait(words: WordsThread, stage: Stage) -> None:
    decode = stage.decode("decode-0", Wait(), FOREVER)

    async def scene() -> None:
        async with desk(words, max_requests=1, max_queued=2, local_prefill="always") as at:
            await at.connect(decode)
            tasks = [asyncio.create_task(gather(at.router, at.request())) for _ in range(2)]
            await eventually(lambda: waiting(at.metrics) == 1)
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(answer, NoWorker), answer

    play(scene)


def test_what_cannot_come_in_time_is_refused(words: WordsThread, stage: Stage) -> None:
    """The one source has 10 s of work: a request that has 5 s is refused, one that has more is not."""
    prefill = stage.prefill()
    decode = stage.decode("decode-0", sources=[prefill])
    prefill.load = pb.LoadReport(queued_prefill_tokens=10_000, prefill_tokens_per_s=1000.0)

    async def scene() -> None:
        async with desk(words) as at:
            await at.connect(prefill, decode)
            with pytest.raises(Busy, match=r"expected in 10\.0 s and wanted within 5 s") as refused:
                await gather(at.router, at.request(deadline_s=5.0))
            assert (refused.value.limit, refused.value.retry_after_s) == ("predicted_ttft", pytest.approx(5.0, abs=0.1))
            assert decode.submits == [] and at.router.num_open == 0
            tokens, _ = await gather(at.router, at.request(deadline_s=20.0))
            assert len(tokens) == 8

    play(scene)

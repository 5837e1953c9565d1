"""The first token of a prompt that was computed elsewhere does not wait for a step of other streams."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import checkpoint
from cluster import config_file
from cluster.request import SamplingParams
from cluster.words_thread import WordsThread
from tests.support.raw_ingress import RawIngress
from tests.support.stepped_worker import SteppedWorker, stepped_pair
from tests.support.words import words_config
from workers.engine.step_plan import StepOutcome

PROMPT, OTHER = tuple(range(1, 40)), tuple(range(40, 60))
SAMPLING = SamplingParams(max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WordsThread, SteppedWorker, SteppedWorker]]:
    directory: Path = tmp_path_factory.mktemp("tiny")
    settings = {
        "model.path": str(checkpoint.write(directory, checkpoint.TINY)),
        "model.load_format": "dummy",
        "kv.block_size": 16,
        "kv.num_blocks": 24,
        "pools": {"prefill": {"workers": 1}, "decode": {"workers": 1}},
        "words.heartbeat_timeout_s": 60.0,
        "words.step_timeout_s": 600.0,  # no turn is no failure here
        "transfer.lease_s": 600.0,
    }
    config = config_file.load(None, settings=settings)
    with WordsThread(config=words_config(heartbeat_timeout_s=60)) as words, stepped_pair(config) as (prefill, decode):
        yield words, prefill, decode


def test_it_is_told_before_the_step(pair: tuple[WordsThread, SteppedWorker, SteppedWorker]) -> None:
    words, prefill, decode = pair
    ingress = RawIngress(words)
    streaming = asyncio.run(ingress.submit(decode.member, decode.member, OTHER, SAMPLING))
    decode.until_told("submit")
    decode.turn_until(lambda: decode.load.num_running == 1)
    request = asyncio.run(ingress.submit(decode.member, prefill.member, PROMPT, SAMPLING))
    decode.until_told("submit")
    decode.turn()
    prefill.until_told("kv_request")
    prefill.turn()
    decode.until_told("ticket")

    engine = decode.worker._parts.engine
    step, held = engine.step, threading.Event()

    def once_let() -> StepOutcome | None:
        assert held.wait(60.0)
        return step()

    engine.step = once_let
    turning = threading.Thread(target=decode.turn)
    turning.start()
    try:
        asyncio.run(ingress.first_token_of(request))
        assert turning.is_alive(), "the step of the other stream has not begun"
    finally:
        held.set()
        turning.join()
        engine.step = step
    for each in (streaming, request):
        ingress.cancel(decode.member, each)
        decode.until_told("cancel")
    decode.turn_until(lambda: not decode.worker._open_work())
    ingress.stop()

"""Worker processes that share one GPU: blocks between them, disaggregated and aggregated, requests that end early."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from cluster.request import FinishReason, SamplingParams
from kvtransfer.transport import TransportKind
from tests.support.gpu_workers import BLOCK_SIZE, FAMILIES, VOCAB_SIZE, assembled, driver, settings, write_checkpoint
from tests.support.kv_builders import latent_geometry
from tests.support.kv_process import RankProcess
from tests.support.plain_cluster import Answer, PlainCluster, running_cluster

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

GREEDY = SamplingParams(max_tokens=48, ignore_eos=True, num_logprobs=0)
SEEDED = SamplingParams(max_tokens=48, ignore_eos=True, temperature=0.8, top_p=0.95, top_k=50, seed=11)


def prompts(count: int, seed: int, *, low: int = 40, high: int = 700) -> list[list[int]]:
    random = Random(seed)
    return [[random.randrange(1, VOCAB_SIZE) for _ in range(random.randint(low, high))] for _ in range(count)]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=["nixl", "ipc"])
def transport(request: pytest.FixtureRequest) -> TransportKind:
    return request.param


@pytest.fixture(scope="module")
def served(folder: Path, transport: TransportKind) -> Iterator[tuple[PlainCluster, asyncio.Runner]]:
    """One prefill and one decode worker."""
    shared = {"router.local_prefill": "never", "router.spare": False, "transfer.transport": transport}
    with running_cluster(settings(folder, **shared), prefill=1, decode=1) as running:
        yield running


def test_blocks_cross_between_processes_bit_for_bit() -> None:
    geometry = latent_geometry(num_layers=8, block_size=BLOCK_SIZE, row_size=576)
    source, sink = (RankProcess(name, geometry, 40, device="cuda") for name in ("source", "sink"))
    with source, sink:
        blocks, into = list(range(1, 33)), list(range(33, 1, -1))
        source.write(blocks, blocks, generation=1)
        connected = sink.connect(source)
        assert connected.error is None, connected
        done = sink.pull(source, blocks, into, [1] * 32)
        assert done.outcome.name == "OK", done
        assert all(sink.read(into, blocks))
        print(f"{connected.transport}: {connected.bytes_per_s / 1e9:.1f} GB/s warming up, {done.seconds * 1e3:.2f} ms")
        source.write(blocks[:4], [77] * 4, generation=2)
        stale = sink.pull(source, blocks[:6], into[:6], [1] * 6)
        assert stale.outcome.name == "STALE" and stale.stale == (0, 1, 2, 3)


def test_disaggregated_equals_aggregated(
    folder: Path, transport: TransportKind, served: tuple[PlainCluster, asyncio.Runner]
) -> None:
    """One request at a time, so that both compute the same chunks and batches; greedy and drawn."""
    cluster, runner = served
    parts = assembled(folder)
    driven = driver(parts)
    for text in prompts(6, seed=5):
        for params in (GREEDY, SEEDED):
            sequence = driven.submit(text, params)
            driven.run()
            parts.blocks.clear_cache()
            answer = runner.run(cluster.ask(text, params))
            assert answer.token_ids == driven.emitted(sequence)
            assert answer.route.transport == transport and not answer.route.local_prefill
            assert answer.route.blocks > 0 or params is SEEDED
            runner.run(cluster.router.clear_cache())
    for executor in parts.executors:
        executor.stop()


def test_many_at_once_and_some_that_end_early_leave_nothing_behind(
    served: tuple[PlainCluster, asyncio.Runner],
) -> None:
    cluster, runner = served
    texts = prompts(40, seed=6)

    async def leave(text: list[int], after: int) -> None:
        stream = cluster.stream(text, GREEDY)
        num_tokens = 0
        async for tokens, _ in stream:
            num_tokens += len(tokens)
            if num_tokens >= after:
                break
        await stream.aclose()

    async def together() -> list[Answer | None]:
        whole = [cluster.ask(text, GREEDY) for text in texts[:24]]
        early = [leave(text, 1 + 3 * index) for index, text in enumerate(texts[24:])]
        return await asyncio.gather(*whole, *early)

    answers = runner.run(together())
    complete = [answer for answer in answers[:24] if answer is not None]
    assert len(complete) == 24
    assert all(answer.finish is FinishReason.LENGTH and len(answer.token_ids) == 48 for answer in complete)
    assert runner.run(cluster.total("sluice_transfer_pulled_blocks_total")) > 0
    runner.run(cluster.assert_all_free())

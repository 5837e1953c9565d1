"""Clusters of plain processes that serve encoder–decoder models, and what is asked of them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import httpx
import pytest

from cluster.log import Log
from cluster.request import SamplingParams
from deploy.api_service import ApiService
from deploy.openai_api import create_app
from deploy.served_model import ServedModel
from tests.support.beam_searches import searching, transformers_finds
from tests.support.checkpoints import checkpoint
from tests.support.encoder_decoders import Text, judge
from tests.support.plain_cluster import Answer, PlainCluster, running_cluster

NUM_TOKENS = 4
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
BLOCK_SIZE = 8


class Scene:
    """A running cluster of one family, and what is asked of it."""

    def __init__(self, family: str, cluster: PlainCluster, runner: asyncio.Runner) -> None:
        self.family = family
        self.cluster = cluster
        self._runner = runner
        self._numbers = count(1)

    def play(self, scene: Coroutine[Any, Any, None]) -> None:
        self._runner.run(scene)

    async def ask(self, text: Text, params: SamplingParams = GREEDY, salt: str = "") -> Answer:
        stream = self.cluster.stream(
            list(text.prompt), params, f"text-{next(self._numbers)}", encoder_token_ids=text.source, cache_salt=salt
        )
        answers = [answer async for _, answer in stream]
        assert answers[-1] is not None
        assert len(answers[-1].token_ids) == (params.max_tokens if params.beams is None else 0)
        return answers[-1]

    def check(self, wanted: Sequence[Text], answers: Sequence[Answer]) -> set[int]:
        """Greedy wherever it is decided; the tokens seen."""
        verdicts = [judge(self.family, text, each.token_ids) for text, each in zip(wanted, answers, strict=True)]
        decided = [verdict for verdict in verdicts if verdict.is_decided]
        assert len(decided) >= 0.9 * len(wanted) and all(verdict.is_greedy for verdict in decided)
        return {token for answer in answers for token in answer.token_ids}

    async def search(self, wanted: Sequence[Text], num_cancelled: int = 3) -> None:
        """What transformers finds, beside searches that nobody waits for."""
        params = searching(4, max_tokens=NUM_TOKENS, no_repeat_ngram_size=2)
        doomed = [asyncio.ensure_future(self.ask(text, searching(4, max_tokens=60))) for text in wanted[:num_cancelled]]
        asked = [asyncio.ensure_future(self.ask(text, params)) for text in wanted]
        await asked[0]
        for task in doomed:
            task.cancel()
        for text, answer in zip(wanted, await asyncio.gather(*asked), strict=True):
            found = transformers_finds(self.family, text, params)
            assert [each.token_ids for each in answer.hypotheses] == [each.token_ids for each in found]
            assert [each.score for each in answer.hypotheses] == pytest.approx([s for _, s in found], abs=1e-3)

    async def expect(self, wanted: Sequence[Text]) -> list[Answer]:
        answers = await asyncio.gather(*(self.ask(text) for text in wanted))
        self.check(wanted, answers)
        return answers


def front_door(cluster: PlainCluster) -> ApiService:
    config = cluster.config
    return ApiService(
        router=cluster.router,
        tokenizer=None,
        model=replace(ServedModel.read(config), name="t5"),
        http=config.http,
        limits=config.limits,
        metrics=cluster.metrics,
        log=Log.open("ingress", config.log),
    )


async def over_http(cluster: PlainCluster, body: dict[str, object], path: str = "/v1/completions") -> dict[str, Any]:
    """What a front door over the cluster's router answers."""
    transport = httpx.ASGITransport(create_app(front_door(cluster)))
    async with httpx.AsyncClient(transport=transport, base_url="http://sluice", timeout=60) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@contextmanager
def running(family: str, *, encode: int = 1, prefill: int = 0, decode: int = 1, **more: object) -> Iterator[Scene]:
    pools = {"encode": encode, "prefill": prefill, "decode": decode}
    settings: dict[str, object] = {
        "model.path": str(checkpoint(family)),
        "kv.block_size": BLOCK_SIZE,
        "kv.num_blocks": 64,
        "scheduler.max_batched_tokens": 64,
        "scheduler.chunk_tokens": 8,
        "scheduler.max_sequences": 16,
        "router.local_prefill": "fallback" if prefill else "always",
        "words.heartbeat_timeout_s": 20.0,
        "words.step_timeout_s": 20.0,  # a busy machine is no failure here
        "pools": {name: {"workers": workers, "threads": 1} for name, workers in pools.items() if workers},
        **more,
    }
    with running_cluster(settings) as (cluster, runner):
        yield Scene(family, cluster, runner)
        if all(worker.process.is_alive() for worker in cluster.workers.values()):
            runner.run(cluster.assert_all_free())

"""Encoder, prefill and decode workers as processes of their own: tokens equal those of transformers, whoever reads the
encoder input, and whatever becomes of it meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest

from cluster.request import SamplingParams
from tests.support.checkpoints import checkpoint
from tests.support.encoder_decoders import Text, judge, texts
from tests.support.plain_cluster import Answer, PlainCluster, running_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

NUM_TOKENS = 4
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
BLOCK_SIZE = 8
FETCHED = "sluice_transfer_encoder_outputs_total"
READ = "sluice_engine_encoder_tokens_total"


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
        assert answers[-1] is not None and len(answers[-1].token_ids) == params.max_tokens
        return answers[-1]

    def check(self, wanted: Sequence[Text], answers: Sequence[Answer]) -> set[int]:
        """Greedy wherever it is decided; the tokens seen."""
        verdicts = [judge(self.family, text, each.token_ids) for text, each in zip(wanted, answers, strict=True)]
        decided = [verdict for verdict in verdicts if verdict.is_decided]
        assert len(decided) >= 0.9 * len(wanted) and all(verdict.is_greedy for verdict in decided)
        return {token for answer in answers for token in answer.token_ids}

    async def expect(self, wanted: Sequence[Text]) -> list[Answer]:
        answers = await asyncio.gather(*(self.ask(text) for text in wanted))
        self.check(wanted, answers)
        return answers


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


def test_encode_prefill_decode() -> None:
    """Every input is read once, by an encode worker; prefill and decode worker each fetch its output."""
    wanted = texts("t5", 64)

    async def scene(stage: Scene) -> None:
        answers = await stage.expect(wanted)
        assert len({token for answer in answers for token in answer.token_ids}) >= 100
        for answer, text in zip(answers, wanted, strict=True):
            route = answer.route
            assert route.prefill.name == "prefill-0" and not route.local_prefill
            assert route.encoded.tokens == len(text.source)
            if route.encoded.encode.name:
                assert route.encoded.encode.name == "encode-0"
        fetched = sum(answer.route.encoded.blocks for answer in answers)
        sources = {text.source for text in wanted}
        assert fetched == sum(-(-len(source) // BLOCK_SIZE) for source in sources)
        assert await stage.cluster.total(READ) == sum(map(len, sources))
        assert await stage.cluster.total(READ, "encode-0") == sum(map(len, sources))

    with running("t5", prefill=1) as stage:
        stage.play(scene(stage))

"""Encoder, prefill and decode workers as processes of their own: tokens equal those of transformers, whoever reads the
encoder input, and whatever becomes of it meanwhile."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import httpx
import pytest

from cluster.errors import WorkerFailed
from cluster.log import Log
from cluster.request import SamplingParams
from deploy.api_service import ApiService
from deploy.openai_api import create_app
from deploy.served_model import ServedModel
from tests.support.beam_searches import searching, transformers_finds
from tests.support.checkpoints import checkpoint
from tests.support.encoder_decoders import Text, encoded, judge, texts
from tests.support.plain_cluster import Answer, PlainCluster, running_cluster
from tests.support.watch import Watch

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


async def over_http(cluster: PlainCluster, body: dict[str, object], path: str = "/v1/completions") -> dict[str, Any]:
    """What a front door over the cluster's router answers."""
    config = cluster.config
    service = ApiService(
        router=cluster.router,
        tokenizer=None,
        model=replace(ServedModel.read(config), name="t5"),
        http=config.http,
        limits=config.limits,
        metrics=cluster.metrics,
        log=Log.open("ingress", config.log),
    )
    transport = httpx.ASGITransport(create_app(service))
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


def test_encode_prefill_decode() -> None:
    """Every input is read once, by an encode worker; prefill and decode worker each fetch its output. Salts keep equal
    texts apart."""
    wanted = texts("t5", 64)

    async def scene(stage: Scene) -> None:
        answers = await asyncio.gather(*(stage.ask(text) for text in wanted))
        assert len(stage.check(wanted, answers)) >= 100
        for answer, text in zip(answers, wanted, strict=True):
            route = answer.route
            assert route.prefill.name == "prefill-0" and not route.local_prefill
            assert route.encoded.tokens == len(text.source) and route.encoded.encode.name in ("encode-0", "")
        sources = {text.source for text in wanted}
        fetched = sum(answer.route.encoded.blocks for answer in answers)
        assert fetched == sum(-(-len(source) // BLOCK_SIZE) for source in sources)
        read = sum(map(len, sources))
        assert await stage.cluster.total(READ) == await stage.cluster.total(READ, "encode-0") == read

        longest = max(wanted, key=lambda text: len(text.source))
        salted = [await stage.ask(longest, salt=salt) for salt in ("one", "one", "other", "other", "")]
        assert [answer.route.encoded.blocks > 0 for answer in salted] == [True, False, True, False, False]
        assert await stage.cluster.total(READ) == read + 2 * len(longest.source)
        assert len({tuple(answer.token_ids) for answer in salted}) == 1

        text = wanted[-1]
        asked = {"prompt": list(text.source), "decoder_prompt": list(text.prompt), "max_tokens": NUM_TOKENS}
        shown = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "return_route": True}
        told = await over_http(stage.cluster, {**asked, **shown, "model": "t5"})
        assert told["choices"][0]["token_ids"] == answers[-1].token_ids
        found = transformers_finds("t5", text, searching(4, num_returned=3, max_tokens=NUM_TOKENS))
        searched = await over_http(stage.cluster, {**asked, **shown, "model": "t5", "num_beams": 4, "n": 3})
        assert [tuple(choice["token_ids"]) for choice in searched["choices"]] == [each.token_ids for each in found]
        assert [choice["score"] for choice in searched["choices"]] == pytest.approx([s for _, s in found], abs=1e-3)
        await stage.search(wanted[:12])

        # Vectors of what the encoder makes of an input, cached or not, read where it is encoded.
        read = await stage.cluster.total(READ, "encode-0")
        inputs = [list(wanted[index].source) for index in (3, 5, 6)]
        for pooling in ("mean", "last"):
            body = {"model": "t5", "input": inputs, **({} if pooling == "mean" else {"pooling": pooling})}
            vectors = await over_http(stage.cluster, body, "/v1/embeddings")
            assert vectors["usage"]["prompt_tokens"] == sum(map(len, inputs))
            for tokens, entry in zip(inputs, vectors["data"], strict=True):
                states = encoded("t5", tuple(tokens))[0]
                wished = states.mean(0) if pooling == "mean" else states[-1]
                assert entry["embedding"] == pytest.approx((wished / wished.norm()).tolist(), abs=1e-4)
        assert await stage.cluster.total(READ, "encode-0") == read + 2 * sum(map(len, inputs))
        assert told["usage"]["sluice"]["encoder_tokens"] == told["usage"]["prompt_tokens"] == len(text.source)

    with running("t5", prefill=1) as stage:
        stage.play(scene(stage))


def test_encoders_die_and_requests_are_cancelled() -> None:
    """Before, while and after they read: another one reads the input again, in the end the decode worker itself."""
    wanted = texts("t5", 16, num_sources=16)

    async def scene(stage: Scene) -> None:
        cluster, watch = stage.cluster, Watch(stage.cluster)
        for name in ("encode-0", "encode-1"):
            cluster.workers[name].signal(signal.SIGSTOP)
        asked = [asyncio.ensure_future(stage.ask(text)) for text in wanted]
        dropped = [asyncio.ensure_future(stage.ask(text)) for text in wanted[:4]]

        await watch.until("decode-0", lambda load: load.num_waiting == 20, "all wait for encoders")
        for task in dropped:
            task.cancel()
        await watch.until("decode-0", lambda load: load.num_waiting == 16, "four are cancelled")
        cluster.workers["encode-1"].signal(signal.SIGCONT)
        await cluster.kill("encode-0")
        answers = await asyncio.gather(*asked)
        stage.check(wanted, answers)
        assert {answer.route.encoded.encode.name for answer in answers} == {"encode-1"}
        assert sum(answer.route.encoded.lost for answer in answers) > 0

        # What was fetched outlives its encoder; the rest is read where the decoder runs, once nobody else is left.
        long = asyncio.ensure_future(stage.ask(wanted[0], SamplingParams(max_tokens=24, ignore_eos=True)))
        await cluster.kill("encode-1")
        answers = await stage.expect(texts("t5", 32, num_sources=16)[16:])
        assert {answer.route.encoded.encode.name for answer in answers} == {""}
        answers = await stage.expect(texts("t5", 4, num_sources=4, longest=30))
        assert {answer.route.encoded.encode.name for answer in answers} == {"decode-0"}
        await long
        watch.stop()

    with running("t5", encode=2) as stage:
        stage.play(scene(stage))


@pytest.mark.full
@pytest.mark.parametrize("family", ["t5-gated", "bart", "mbart"])
def test_families(family: str) -> None:
    """Encode and decode apart, then all on one worker: one code path. Blocks are short, so that some are preempted."""
    wanted = texts(family, 112, num_sources=28)
    long = SamplingParams(max_tokens=40, ignore_eos=True)

    async def scene(stage: Scene) -> None:
        hurried = [asyncio.ensure_future(stage.ask(text, long)) for text in wanted[:16]]
        answers = await asyncio.gather(*(stage.ask(text) for text in wanted))
        assert len(stage.check(wanted, answers)) >= 100
        await asyncio.gather(*hurried)
        assert await stage.cluster.total("sluice_engine_preemptions_total") > 0

    few: dict[str, Any] = {"kv.num_blocks": 24}
    with running(family, **few) as stage:
        stage.play(scene(stage))
    one: dict[str, Any] = {"pools": {"all": {"workers": 1, "roles": ["encode", "prefill", "decode"], "threads": 1}}}
    with running(family, **few, **one) as stage:
        stage.play(scene(stage))


@pytest.mark.full
def test_one_worker_of_each_stage_dies_under_load() -> None:
    """A decode worker's streams go on elsewhere with the encoder input that they had."""
    wanted = texts("t5", 48, num_sources=24)
    longer = SamplingParams(max_tokens=30, ignore_eos=True)

    async def scene(stage: Scene) -> None:
        asked = [asyncio.ensure_future(stage.ask(text, longer)) for text in wanted]
        for number, name in enumerate(("decode-0", "encode-0", "prefill-0")):
            while sum(task.done() for task in asked) < 2 + 4 * number:
                await asyncio.sleep(0.001)
            await stage.cluster.kill(name)
        answers = await asyncio.gather(*asked)
        heads = [replace(answer, token_ids=answer.token_ids[:NUM_TOKENS]) for answer in answers]
        stage.check(wanted, heads)
        stage.check(wanted, answers)
        assert max(answer.attempt for answer in answers) > 1, "no stream was moved"
        stage.cluster.publish()
        await stage.cluster.assert_all_free()

    with running("t5", encode=2, prefill=2, decode=2) as stage:
        stage.play(scene(stage))


@pytest.mark.full
def test_an_input_that_kills_encoders_ends_its_request_alone() -> None:
    """Two died under it: neither a third nor the decode worker reads it."""
    text = texts("t5", 8)[7]

    async def scene(stage: Scene) -> None:
        cluster = stage.cluster
        encoders = [f"encode-{number}" for number in range(3)]
        for name in encoders:
            cluster.workers[name].signal(signal.SIGSTOP)
        asked = asyncio.ensure_future(stage.ask(text))
        watch = Watch(cluster)
        await watch.until("decode-0", lambda load: load.num_waiting == 1, "it waits for an encoder")
        told = cluster.router.route("text-1")
        assert told is not None
        first, spare = told.attempts[0].encode, told.attempts[0].encode_spare
        assert first is not None and spare is not None
        await cluster.kill(first)
        while not await watch.counter("decode-0", FETCHED):  # one is lost, and in the same moment the spare is asked
            await asyncio.sleep(0.001)
        await cluster.kill(spare)
        with pytest.raises(WorkerFailed, match="encoders died or failed while they read the input"):
            await asked
        (left,) = set(encoders) - {first, spare}
        cluster.workers[left].signal(signal.SIGCONT)
        watch.stop()
        await stage.expect([other for other in texts("t5", 8) if other.source != text.source])

    with running("t5", encode=3) as stage:
        stage.play(scene(stage))

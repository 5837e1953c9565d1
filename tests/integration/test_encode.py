"""Encoder, prefill and decode workers as processes of their own: tokens equal those of transformers, whoever reads the
encoder input, and whatever becomes of it meanwhile."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import WorkerFailed
from cluster.protos import worker_pb2 as pb
from cluster.request import SamplingParams
from tests.support.beam_searches import searching, transformers_finds
from tests.support.encode_scenes import BLOCK_SIZE, GREEDY, NUM_TOKENS, Scene, over_http, running
from tests.support.encoder_decoders import Text, encoded, judge, texts
from tests.support.raw_ingress import RawIngress
from tests.support.watch import Watch

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

FETCHED = "sluice_transfer_encoder_outputs_total"
READ = "sluice_engine_encoder_tokens_total"
DRAWN = "sluice_engine_sampled_tokens_total"
FEW = {"kv.num_blocks": 40}  # some are preempted
LAYOUTS: dict[str, dict[str, Any]] = {
    "one worker": {"pools": {"decode": {"workers": 1, "roles": ["encode", "prefill", "decode"], "threads": 1}}},
    "E+D": {},
    "E+P+D": {"prefill": 1},
}


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
        drawn = await stage.cluster.total(DRAWN, "decode")
        searched = await over_http(stage.cluster, {**asked, **shown, "model": "t5", "num_beams": 4, "n": 3})
        assert await stage.cluster.total(DRAWN, "decode") == drawn + 4 * NUM_TOKENS
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
@pytest.mark.parametrize("family", ["t5", "t5-gated", "bart", "mbart", "t5-small"])
@pytest.mark.parametrize("stages", LAYOUTS)
def test_families(family: str, stages: str) -> None:
    """All on one worker, encode and decode apart, and each stage apart: one code path. Ragged inputs in a batch, pools
    too small for all of it, greedy texts and searches, some cancelled; and whatever is cached."""
    wanted = texts(family, 112, num_sources=28)
    long = SamplingParams(max_tokens=40, ignore_eos=True)

    async def scene(stage: Scene) -> None:
        total, watch = stage.cluster.total, Watch(stage.cluster)
        hurried = [asyncio.ensure_future(stage.ask(text, long)) for text in wanted[:16]]
        dropped = [asyncio.ensure_future(stage.ask(text, long)) for text in wanted[16:24]]
        asked = [asyncio.ensure_future(stage.ask(text)) for text in wanted]
        await watch.until("decode-0", lambda load: load.num_running >= 8, "eight are decoded in a batch")
        watch.stop()
        for task in dropped:
            task.cancel()
        assert len(stage.check(wanted, await asyncio.gather(*asked))) >= 100
        await asyncio.gather(*hurried)
        assert await total("sluice_engine_preemptions_total") > 0
        await stage.search(wanted[:8])

        # A salt of one's own makes a cold run. One prompt behind two inputs, then again: nothing is mixed up or lost.
        prompt = max((text.prompt for text in wanted), key=len)
        pair = [Text(source, prompt) for source in (wanted[5].source, wanted[6].source)]
        cold = [await stage.ask(text, salt="cold") for text in pair]
        stage.check(pair, cold)
        assert cold[0].token_ids != cold[1].token_ids
        again = [await stage.ask(text) for text in pair]
        read, drawn = await total(READ), await total(DRAWN)
        warm = [await stage.ask(text) for text in pair]
        for answers in (again, warm):
            assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in cold]
        assert await total(READ) == read and await total(DRAWN) == drawn + 2 * NUM_TOKENS
        assert all(answer.route.decode_prefix_hit_tokens >= BLOCK_SIZE for answer in warm)

    with running(family, **LAYOUTS[stages], **FEW) as stage:
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


@pytest.mark.parametrize("knows_one", [True, False])
def test_who_reaches_no_encoder_reads_the_input_and_computes_the_prompt(*, knows_one: bool) -> None:
    """Though a prefill worker is planned: an ingress may hear later than the worker that an encoder is gone."""
    wanted = texts("t5", 2)

    async def scene(stage: Scene) -> None:
        raw = RawIngress(stage.cluster.words)
        encode, prefill, decode = (
            stage.cluster.workers[f"{name}-0"].member for name in ("encode", "prefill", "decode")
        )
        assert encode is not None and prefill is not None and decode is not None
        gone = [replace(encode, incarnation="gone")] if knows_one else []
        more: dict[str, Any] = {"encoders": gone, "local_prefill_allowed": True}
        try:
            asked = [
                await raw.submit(decode, prefill, text.prompt, GREEDY, source=text.source, **more) for text in wanted
            ]
            for text, name in zip(wanted, asked, strict=True):
                assert (await raw.end_of(name)).finish == pb.LENGTH
                assert judge("t5", text, raw.token_ids[name]).is_greedy
        finally:
            raw.stop()
        assert await stage.cluster.total(READ, "decode-0") == sum(len(text.source) for text in wanted)
        assert await stage.cluster.total(READ) == await stage.cluster.total(READ, "decode-0")

    with running("t5", prefill=1) as stage:
        stage.play(scene(stage))

"""What is read off a prompt and its tokens besides them: logprobs, prompt logprobs, embeddings. Disaggregated equals
aggregated equals transformers, with prefix hits, with preemption, and when a source dies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from torch import Tensor

from cluster.errors import InvalidRequest
from cluster.protos import worker_pb2 as pb
from cluster.request import FinishReason, Grammar, GrammarKind, Pooling, SamplingParams, TokenLogprobs
from tests.support.checkpoints import VOCAB_SIZE, checkpoint, greedy, greedy_each, transformers_model
from tests.support.plain_cluster import Answer, PlainCluster, running_cluster
from tests.support.raw_ingress import RawIngress
from tests.support.served import PATIENT, Served, serving
from tests.support.watch import Watch

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

FAMILY = "llama"
NUM_TOKENS = 24
BLOCK_SIZE = 16
CHUNK = 32
TOLERANCE = 2e-4
SETTINGS = {
    **PATIENT,
    "model.path": str(checkpoint(FAMILY)),
    "kv.block_size": BLOCK_SIZE,
    "kv.num_blocks": 128,
    "scheduler.max_batched_tokens": 96,
    "scheduler.chunk_tokens": CHUNK,
    "scheduler.max_sequences": 16,
}
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
LOGPROBS = replace(GREEDY, num_logprobs=3)
BOTH = replace(GREEDY, num_logprobs=1, num_prompt_logprobs=4)
SEEDED = replace(BOTH, temperature=0.9, seed=11)


def prompts(count: int, seed: int, *, low: int = 20, high: int = 140) -> list[list[int]]:
    random = Random(seed)
    return [[random.randrange(1, VOCAB_SIZE - 1) for _ in range(random.randint(low, high))] for _ in range(count)]


@pytest.fixture(scope="module")
def split() -> Iterator[Served]:
    with serving(SETTINGS, prefill=2, decode=2) as served:
        yield served


@pytest.fixture(scope="module")
def whole() -> Iterator[Served]:
    """Aggregated: one worker with both roles."""
    with serving(SETTINGS, mixed=1) as served:
        yield served


@torch.inference_mode()
def log_softmax(tokens: Sequence[int]) -> Tensor:
    """[tokens, vocabulary]: row i is about token i + 1."""
    return transformers_model(FAMILY)(torch.tensor([list(tokens)])).logits[0].float().log_softmax(-1)


def assert_said(entry: TokenLogprobs, row: Tensor, token: int, num_top: int) -> None:
    """Ids that tie may come in any order: their logprobs may not."""
    assert abs(entry.logprob - row[token].item()) < TOLERANCE
    ids, logprobs = [each for each, _ in entry.top], torch.tensor([value for _, value in entry.top])
    assert len(set(ids)) == num_top
    if num_top:
        assert torch.allclose(logprobs, row.topk(num_top).values, atol=TOLERANCE)
        assert torch.allclose(logprobs, row[ids], atol=TOLERANCE)


def assert_read(text: list[int], answer: Answer, params: SamplingParams) -> None:
    """Every logprob that was asked for, and no other."""
    rows = log_softmax([*text, *answer.token_ids])
    if params.num_logprobs is None:
        assert answer.logprobs == []
    else:
        for offset, (token, entry) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            assert_said(entry, rows[len(text) + offset - 1], token, params.num_logprobs)
    if params.num_prompt_logprobs is None:
        assert answer.prompt_logprobs == ()
    else:
        for index, (token, entry) in enumerate(zip(text[1:], answer.prompt_logprobs, strict=True)):
            assert_said(entry, rows[index], token, params.num_prompt_logprobs)


@pytest.mark.parametrize("params", [LOGPROBS, BOTH, SEEDED, replace(BOTH, num_logprobs=None, num_prompt_logprobs=0)])
def test_logprobs_are_those_of_transformers_in_either_mode(
    split: Served, whole: Served, params: SamplingParams
) -> None:
    texts = [*prompts(4, seed=1), [7], prompts(1, seed=2, low=64, high=64)[0]]
    for served in (split, whole):
        served.runner.run(served.cluster.router.clear_cache())
    apart, together = split.ask(texts, params), whole.ask(texts, params)
    for text, one, other in zip(texts, apart, together, strict=True):
        assert one.token_ids == other.token_ids
        if params.temperature == 0:
            assert one.token_ids == greedy(FAMILY, tuple(text), NUM_TOKENS)
        assert_read(text, one, params)
        assert_read(text, other, params)
        assert one.route.blocks == -(-len(text) // BLOCK_SIZE) and other.route.blocks == 0


def test_a_cached_prompt_moves_nothing_again_and_is_read_whole(split: Served, whole: Served) -> None:
    text = prompts(1, seed=3, low=100, high=100)[0]
    plain = split.ask([text] * 6, GREEDY)  # both decode workers have it, and a source
    for served, count in ((split, 4), (whole, 2)):
        for _ in range(count):
            [answer] = served.ask([text], BOTH)
            assert answer.token_ids == plain[0].token_ids
            assert_read(text, answer, BOTH)
            route = answer.route
            assert route.prefill_prefix_hit_tokens == 0, "the source computes all of it"
            hits = route.decode_prefix_hit_tokens // BLOCK_SIZE
            assert route.blocks == (0 if served is whole else -(-len(text) // BLOCK_SIZE) - hits)
    [again] = split.ask([text], BOTH)
    assert again.route.decode_prefix_hit_tokens == len(text) // BLOCK_SIZE * BLOCK_SIZE
    [hit] = whole.ask([text], GREEDY)
    assert hit.token_ids == plain[0].token_ids
    split.runner.run(split.cluster.assert_all_free())


def test_the_best_twenty_of_a_long_prompt_arrive(split: Served) -> None:
    """Frames of up to 64 KiB are not enough for a chunk of them."""
    text = prompts(1, seed=4, low=480, high=480)[0]
    params = replace(BOTH, max_tokens=4, num_prompt_logprobs=300)  # of the tiny vocabulary
    [answer] = split.ask([text], params)
    assert answer.route.chunks >= len(text) // CHUNK
    assert_read(text, answer, params)


@pytest.mark.parametrize("pooling", [Pooling.LAST, Pooling.MEAN])
def test_embeddings_are_those_of_transformers_and_take_no_room_on_decode(
    split: Served, whole: Served, pooling: Pooling
) -> None:
    params = SamplingParams(pooling=pooling)
    texts = [*prompts(5, seed=5), [9]]
    computed = split.total("sluice_engine_computed_tokens_total", "decode")
    pulled = split.total("sluice_transfer_pulled_blocks_total", "decode")
    for served in (split, whole):
        for text, answer in zip(texts * 2, [*served.ask(texts, params), *served.ask(texts, params)], strict=True):
            with torch.inference_mode():
                hidden = transformers_model(FAMILY)(torch.tensor([text]), output_hidden_states=True).hidden_states
            states = hidden[-1][0].float()
            expected = states[-1] if pooling is Pooling.LAST else states.mean(0)
            assert torch.allclose(torch.tensor(answer.embedding), expected, atol=1e-4, rtol=1e-4)
            assert (answer.token_ids, answer.finish, answer.route.blocks) == ([], FinishReason.STOP, 0)
            assert answer.logprobs == [] and answer.prompt_logprobs == ()
    assert split.total("sluice_engine_computed_tokens_total", "decode") == computed
    assert split.total("sluice_transfer_pulled_blocks_total", "decode") == pulled
    split.runner.run(split.cluster.assert_all_free())


def test_parameters_that_a_worker_does_not_know_end_that_request_alone(split: Served) -> None:
    cluster = split.cluster
    unknown = pb.SamplingParams.FromString(SamplingParams(max_tokens=4).wire().SerializeToString() + b"\xa0\x01\x63")
    assert unknown.pooling == 99
    text = tuple(prompts(1, seed=6)[0])

    async def scene() -> None:
        raw = RawIngress(cluster.words)
        decode, prefill = cluster.workers["decode-0"].member, cluster.workers["prefill-0"].member
        assert decode is not None and prefill is not None
        try:
            good = await raw.submit(decode, prefill, text, GREEDY)
            bad = await raw.submit(decode, prefill, text, unknown)
            failed = await raw.end_of(bad)
            assert (failed.finish, failed.failure.code) == (pb.ERROR, pb.INVALID)
            assert "99" in failed.failure.message
            assert (await raw.end_of(good)).finish == pb.LENGTH and raw.num_tokens[good] == NUM_TOKENS
            session = await raw.session(prefill)
            ask = pb.KvRequest(
                key=pb.RequestKey(request_id="bad", attempt=1),
                token_ids=text,
                num_prompt_tokens=len(text),
                sampling=unknown,
            )
            session.send(pb.Frame(kv_request=ask))
            assert (await raw.refusal_of("bad")).code == pb.INVALID and session.open
        finally:
            raw.stop()
        grammar = replace(GREEDY, grammar=Grammar(GrammarKind.REGEX, "(unbalanced"))
        with pytest.raises(InvalidRequest):
            await cluster.ask(list(text), grammar)

    split.runner.run(scene())


def test_preempted_requests_are_read_once() -> None:
    """A pool too small for all of them, aggregated and apart."""
    texts = prompts(8, seed=7, low=90, high=140)
    params = replace(BOTH, max_tokens=40)
    wanted = greedy_each(FAMILY, texts, params.max_tokens)
    small = {"kv.num_blocks": 26, "kv.prefill_reserve": 0.1}
    for pools in ({"prefill": 1, "decode": 1}, {"mixed": 1}):
        with serving({**SETTINGS, **small}, **pools) as served:
            answers = served.ask(texts, params)
            assert [answer.token_ids for answer in answers] == wanted
            for text, answer in zip(texts, answers, strict=True):
                assert_read(text, answer, params)
            assert sum(answer.route.preemptions for answer in answers) > 0, "the pool was not full"


async def killed_while_it_computes(
    cluster: PlainCluster, texts: list[list[int]], params: SamplingParams
) -> tuple[list[Answer], str]:
    """The answers, and the name of the source that died on the way to them. Enough prompts to be in the middle of."""
    await cluster.router.clear_cache()
    watch = Watch(cluster)
    try:
        asked = asyncio.gather(*(cluster.ask(text, params) for text in texts))
        sources = [name for name in cluster.workers if name.startswith("prefill")]
        while not (busy := [name for name in sources if (await watch.load(name)).num_running]):
            assert not asked.done(), "it was never seen computing"
        await cluster.kill(busy[0])
        return await asked, busy[0]
    finally:
        watch.stop()


def assert_same_vectors(answers: list[Answer], others: list[Answer]) -> None:
    for answer, other in zip(answers, others, strict=True):
        assert answer.embedding
        assert torch.allclose(torch.tensor(answer.embedding), torch.tensor(other.embedding), atol=1e-4)


MEAN = SamplingParams(pooling=Pooling.MEAN)


@pytest.mark.parametrize("params", [BOTH, MEAN])
def test_a_source_that_dies_in_the_middle_of_a_prompt_leaves_no_gap(split: Served, params: SamplingParams) -> None:
    """Its spare reads the prompt off from the start."""
    texts = prompts(8, seed=8, low=300, high=470)
    cluster = split.cluster
    answers, dead = split.runner.run(killed_while_it_computes(cluster, texts, params))
    split.runner.run(cluster.replace(dead))
    assert sum(answer.route.spare_used for answer in answers) > 0
    if params.pooling is None:
        for text, answer in zip(texts, answers, strict=True):
            assert_read(text, answer, params)
    else:
        assert_same_vectors(answers, split.ask(texts, params))
    split.runner.run(cluster.assert_all_free())


def test_without_another_source_the_decode_worker_reads_all_of_the_prompt() -> None:
    """The blocks that came before are not enough: what is read off them was not told."""
    texts = prompts(6, seed=9, low=300, high=470)
    settings = {**SETTINGS, "router.local_prefill": "fallback", "kv.num_blocks": 256}
    with running_cluster(settings, prefill=1, decode=1) as (cluster, runner):
        served = Served(cluster, runner)
        for params in (BOTH, MEAN):
            answers, dead = runner.run(killed_while_it_computes(cluster, texts, params))
            lost = [answer.route for answer in answers if answer.route.recomputed_tokens]
            assert lost and all(route.local_prefill for route in lost)
            assert any(route.recomputed_tokens == route.prompt_tokens for route in lost)
            runner.run(cluster.replace(dead))
            if params.pooling is None:
                for text, answer in zip(texts, answers, strict=True):
                    assert_read(text, answer, params)
            else:
                assert_same_vectors(answers, served.ask(texts, params))
        runner.run(cluster.assert_all_free())

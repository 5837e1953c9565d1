"""One trace per request, as a real receiver got it: every stage with its sizes, also of a worker that was killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.checkpoints import checkpoint
from tests.support.encoder_decoders import texts
from tests.support.otlp_receiver import OtlpReceiver, Span, otlp_receiver
from tests.support.plain_cluster import PlainCluster, running_cluster
from tests.support.traced_front import APP, traced_front

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BLOCK_SIZE = 8
NUM_TOKENS = 40
KILL_AT = 8
SETTINGS: dict[str, object] = {
    "kv.block_size": BLOCK_SIZE,
    "kv.num_blocks": 64,
    "scheduler.max_batched_tokens": 64,
    "scheduler.chunk_tokens": 8,
    "scheduler.max_sequences": 16,
    "router.local_prefill": "fallback",
    "words.step_timeout_s": 20.0,  # a busy machine is no failure here
    "pools": {"encode": {"workers": 1}, "prefill": {"workers": 1}, "decode": {"workers": 2}},
}


@pytest.fixture(scope="module")
def told() -> Iterator[tuple[dict[str, Span], dict[str, dict[str, Any]]]]:
    """The traces by trace id, and what the client got of each request that it made."""
    settings = {**SETTINGS, "model.path": str(checkpoint("t5"))}
    with otlp_receiver() as receiver, running_cluster(settings) as (cluster, runner):
        answers = runner.run(_requests(cluster, receiver))
        yield receiver.traces(), answers


async def _requests(cluster: PlainCluster, receiver: OtlpReceiver) -> dict[str, dict[str, Any]]:
    text = max(texts("t5", 16), key=lambda text: len(text.source) + len(text.prompt))
    body = {"model": "tiny", "prompt": list(text.source), "decoder_prompt": list(text.prompt)}
    body |= {"max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
    answers: dict[str, dict[str, Any]] = {}
    async with traced_front(cluster, receiver.endpoint) as client:
        for name, flags in (("whole", "01"), ("unwanted", "00")):
            headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-{flags}"}
            answer = await client.post("/v1/completions", json={**body, "return_route": True}, headers=headers)
            answers[name] = answer.raise_for_status().json()
        headers = {"traceparent": "00-nonsense", "x-request-id": "killed"}
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}, headers=headers) as stream:
            answers["killed"] = await _killed(cluster, client, stream)
        refused = await client.post("/v1/completions", json={**body, "max_tokens": 10**6})
        assert refused.status_code == 413
    return answers


async def _killed(cluster: PlainCluster, client: httpx.AsyncClient, stream: httpx.Response) -> dict[str, Any]:
    """Kills the decode worker in the middle of the stream, which ends well all the same."""
    tokens: list[int] = []
    victim = ""
    async for line in stream.aiter_lines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        tokens += event["choices"][0]["token_ids"]
        if len(tokens) >= KILL_AT and not victim:
            route = (await client.get(f"/v1/requests/{event['id']}/route")).raise_for_status().json()
            victim = route["attempts"][-1]["decode"]
            await cluster.kill(victim)
    assert victim and stream.status_code == 200
    return {"victim": victim, "tokens": tokens}


def check(span: Span) -> None:
    """Children lie within their parents, and a stage has a length."""
    for child in span.children:
        assert span.start_ns <= child.start_ns <= child.end_ns <= span.end_ns, (span.name, child.name)
        assert child.trace_id == span.trace_id
        check(child)


def size(span: Span, key: str) -> float:
    value = span.attributes[f"sluice.{key}"]
    assert isinstance(value, int | float)
    return value


def names(span: Span) -> list[str]:
    return [child.name for child in span.children]


def test_every_stage_with_its_sizes(told: tuple[dict[str, Span], dict[str, dict[str, Any]]]) -> None:
    traces, answers = told
    root = traces[TRACE_ID]
    route = answers["whole"]["usage"]["sluice"]
    assert (root.name, root.parent_id, root.kind) == ("POST /v1/completions", PARENT_ID, "SERVER")
    assert root.resource["service.name"] == APP and root.attributes["sluice.outcome"] == "ok"
    check(root)
    assert names(root) == ["prepare", "sequence"] and names(root.find("sequence")) == ["queue", "attempt 1"]
    attempt = root.find("sequence", "attempt 1")
    assert sorted(names(attempt)) == ["decode", "encode", "prefill", "transfer"]
    encode, prefill, transfer, decode = (attempt.find(n) for n in ("encode", "prefill", "transfer", "decode"))
    assert encode.end_ns <= prefill.start_ns <= transfer.start_ns and transfer.end_ns <= decode.start_ns
    assert prefill.end_ns <= attempt.events["first token"] <= decode.end_ns and decode.seconds > 0

    def told_of(span: Span, *keys: str) -> list[Any]:
        return [span.attributes.get(f"sluice.{key}") for key in keys]

    who = ("worker", "incarnation", "pid")
    assert told_of(attempt, *who) == [route["decode"][key] for key in ("name", "incarnation", "pid")]
    assert told_of(prefill, *who) == [route["prefill"][key] for key in ("name", "incarnation", "pid")]
    assert told_of(encode, "worker", "tokens", "blocks", "bytes") == [
        route[key] for key in ("encoded_by", "encoder_tokens", "encoded_blocks", "encoded_bytes")
    ]
    assert encode.attributes["sluice.worker"] == "encode-0" and encode.attributes["sluice.bytes"]
    assert told_of(prefill, "tokens", "chunks", "prefix_hit_tokens") == [
        route[key] for key in ("prompt_tokens", "chunks", "prefill_prefix_hit_tokens")
    ]
    assert prefill.attributes["sluice.chunks"] == 2 and prefill.attributes["sluice.compute_s"]
    assert told_of(transfer, "blocks", "bytes", "transport") == [route[key] for key in ("blocks", "bytes", "transport")]
    rate = size(transfer, "gb_per_s")
    assert rate == pytest.approx(route["bytes"] / (route["transfer_ms"] / 1e3) / 1e9) and rate > 0
    assert told_of(attempt, "attempt", "replay", "tokens", "local_prefill") == [1, False, NUM_TOKENS, False]
    assert not any(span.error for span in root.below())


def test_a_killed_worker_is_in_the_trace(told: tuple[dict[str, Span], dict[str, dict[str, Any]]]) -> None:
    traces, answers = told
    root = next(root for root in traces.values() if root.attributes["sluice.http_request_id"] == "killed")
    assert root.trace_id != TRACE_ID and not root.parent_id and not root.error
    check(root)
    first, second = (root.find("sequence", f"attempt {number}") for number in (1, 2))
    assert first.attributes["sluice.worker"] == answers["killed"]["victim"] != second.attributes["sluice.worker"]
    assert first.attributes["sluice.incarnation"] != second.attributes["sluice.incarnation"]
    assert first.error.startswith("peer_lost: ") and not second.error
    decode = first.find("decode")
    assert decode.error == "the attempt ended" and decode.end_ns == first.end_ns <= second.start_ns
    assert not any(span.error for span in first.children if span is not decode), "told before it was killed"
    num_known = size(first, "tokens")
    assert num_known >= KILL_AT
    assert (second.attributes["sluice.replay"], second.attributes["sluice.tokens_known"]) == (True, num_known)
    assert num_known + size(second, "tokens") == NUM_TOKENS
    assert size(second.find("prefill"), "tokens") == size(first.find("prefill"), "tokens") + num_known


def test_what_was_refused_and_what_is_not_wanted(told: tuple[dict[str, Span], dict[str, dict[str, Any]]]) -> None:
    """Three traces of four requests: a trace context that is not sampled is left alone."""
    traces, answers = told
    tokens = answers["whole"]["choices"][0]["token_ids"]
    assert answers["unwanted"]["choices"][0]["token_ids"] == answers["killed"]["tokens"] == tokens
    outcomes = sorted(str(root.attributes["sluice.outcome"]) for root in traces.values())
    assert outcomes == ["invalid", "ok", "ok"]
    refused = next(root for root in traces.values() if root.attributes["sluice.outcome"] == "invalid")
    assert names(refused) == ["prepare"] and refused.attributes["error.type"] == "invalid" and not refused.error

"""Traces of an app in Ray Serve: a request through its public port, as a real receiver got it."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from cluster.config_file import parse
from cluster.membership import Membership
from deploy import life
from deploy.local_app import local_app
from tests.support.checkpoints import checkpoint
from tests.support.encoder_decoders import judge, texts
from tests.support.otlp_receiver import otlp_receiver
from tests.support.ray_cluster import until

pytestmark = [pytest.mark.full, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

APP = "traced"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
NUM_TOKENS = 24


def test_the_stages_of_a_served_request_are_one_trace() -> None:
    """It asks for a trace; the one after it does not, and none is drawn by lot."""
    text = max(texts("t5", 16), key=lambda text: len(text.source) + len(text.prompt))
    body = {"model": "tiny", "prompt": list(text.source), "decoder_prompt": list(text.prompt), "temperature": 0}
    body |= {"max_tokens": NUM_TOKENS, "ignore_eos": True, "return_token_ids": True}
    with otlp_receiver() as receiver:
        config = parse(
            {
                "name": APP,
                "model": {"path": str(checkpoint("t5")), "served_name": "tiny"},
                "kv": {"num_blocks": 64, "block_size": 8},
                "router": {"local_prefill": "never"},
                "pools": {"encode": {"workers": 1}, "prefill": {"workers": 1}, "decode": {"workers": 1}},
                "words": {"heartbeat_timeout_s": 20.0, "step_timeout_s": 30.0},  # a busy machine is no failure here
                "http": {"port": 0},
                "traces": {"endpoint": receiver.endpoint, "sample_rate": 0.0},
                "log": {"level": "error"},
            }
        )
        with local_app(config, lambda _: None) as app:
            pids = {member.name: member.pid for member in Membership.from_wire(life.status(APP).membership).members}
            for headers in ({"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}, {}):
                url = f"{app.url}/v1/completions"
                answer = httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False).raise_for_status()
                tokens = answer.json()["choices"][0]["token_ids"]
                assert len(tokens) == NUM_TOKENS and judge("t5", text, tokens).is_greedy
            asyncio.run(until(lambda: bool(receiver.rows()), "sent while it runs", 60))
        traces = receiver.traces()  # what was still to be sent is there: the replica has ended
    (root,) = traces.values()
    assert (root.trace_id, root.parent_id, root.name) == (TRACE_ID, PARENT_ID, "POST /v1/completions")
    assert root.resource["service.name"] == APP and str(root.resource["service.instance.id"]).startswith("ingress-")
    attempt = root.find("sequence", "attempt 1")
    stages = {span.name: span for span in attempt.children}
    assert list(stages) == ["encode", "prefill", "transfer", "decode"], "in the order of their begins"
    for name, worker in (("encode", "encode"), ("prefill", "prefill"), ("transfer", "prefill"), ("decode", "decode")):
        span = stages[name]
        assert span.trace_id == TRACE_ID and span.attributes["sluice.worker"] == f"{worker}-0" and not span.error
        assert attempt.start_ns <= span.start_ns <= span.end_ns <= attempt.end_ns
    assert stages["prefill"].attributes["sluice.pid"] == pids["prefill-0"]
    assert attempt.attributes["sluice.pid"] == pids["decode-0"] and attempt.attributes["sluice.tokens"] == NUM_TOKENS
    assert stages["transfer"].attributes["sluice.bytes"] and stages["encode"].attributes["sluice.bytes"]

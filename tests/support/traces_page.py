"""The traces in docs/traces.md, as a receiver got them. A test compares page and kept spans.

python -m tests.support.traces_page         writes the page anew from docs/traces.json
python -m tests.support.traces_page run     takes the traces of running clusters first
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import httpx

from tests.support.otlp_receiver import OtlpReceiver, Span, otlp_receiver, roots
from tests.support.plain_cluster import PlainCluster, plain_cluster
from tests.support.traced_front import traced_front

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "traces.md"
KEPT = ROOT / "docs" / "traces.json"
WIDTH = 116
NUM_SHARED, NUM_OWN = 64, 128  # tokens of the prompts of the first two requests
_SHORTENED = ("incarnation", "request_id", "http_request_id", "plan.follows")
_LEFT_OUT = ("http.request.method", "http.route", "gen_ai.request.model")
_SETTINGS: Mapping[str, object] = {
    "kv.block_size": 16,
    "kv.num_blocks": 256,
    "scheduler.chunk_tokens": 48,
    "scheduler.max_batched_tokens": 96,
    "words.step_timeout_s": 60.0,
}


def page() -> str:
    """What the page is to say, with whatever people wrote between the marked parts."""
    text = PAGE.read_text()
    kept = json.loads(KEPT.read_text())
    for name, rows in kept.items():
        begin, end = f"<!-- {name}: written by tests/support/traces_page.py -->", f"<!-- end of {name} -->"
        assert text.count(begin) == text.count(end) == 1, f"{PAGE.name} has no part {name!r}"
        (root,) = roots(rows)
        tree = "\n".join(["```", *lines(root), "```"])
        text = re.sub(f"(?s){re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n{tree}\n{end}", text)  # noqa: B023
    return text


def lines(root: Span) -> Iterator[str]:
    """The tree: each span with its begin and its length in ms, then its attributes."""
    yield from _lines(root, root.start_ns, "", "")


def _lines(span: Span, zero_ns: int, branch: str, stem: str) -> Iterator[str]:
    begin, length = (span.start_ns - zero_ns) / 1e6, (span.end_ns - span.start_ns) / 1e6
    name = f"{branch}{span.name}"
    error = "  " + textwrap.shorten(f"ERROR {span.error}", 70, placeholder=" …") if span.error else ""
    yield f"{name:34} {begin:9.2f} + {length:.2f} ms{error}"
    told = [f"{key.removeprefix('sluice.')}={_shown(key, value)}" for key, value in span.attributes.items()]
    told = [each for each in told if not each.startswith(_LEFT_OUT)]
    told += [f"[{event} at {(at - zero_ns) / 1e6:.2f} ms]" for event, at in span.events.items()]
    inner = stem + ("│    " if span.children else "     ")
    yield from textwrap.wrap("  ".join(told), WIDTH, initial_indent=inner, subsequent_indent=inner)
    for child in span.children:
        is_last = child is span.children[-1]
        yield from _lines(child, zero_ns, stem + ("└─ " if is_last else "├─ "), stem + ("   " if is_last else "│  "))


def _shown(key: str, value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)[:8] if key.removeprefix("sluice.") in _SHORTENED else str(value)


# ---------------------------------------------------------------- taking them


async def _stream(cluster: PlainCluster, client: httpx.AsyncClient, body: dict[str, Any], kill_at: int | None) -> None:
    num_tokens = 0
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        assert stream.status_code == 200, await stream.aread()
        async for line in stream.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            num_tokens += len(event["choices"][0]["token_ids"])
            if kill_at is not None and num_tokens >= kill_at:
                kill_at = None
                route = (await client.get(f"/v1/requests/{event['id']}/route")).raise_for_status().json()
                await cluster.kill(route["attempts"][-1]["decode"])


async def _decoders(receiver: OtlpReceiver) -> None:
    from tests.support.checkpoints import VOCAB_SIZE, checkpoint

    draw = Random(0)
    told = {"model": "tiny", "max_tokens": 48, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
    settings = {**_SETTINGS, "model.path": str(checkpoint("llama")), "router.local_prefill": "never"}
    async with (
        plain_cluster(settings, prefill=2, decode=2) as cluster,
        traced_front(cluster, receiver.endpoint) as client,
    ):
        shared = [draw.randrange(1, VOCAB_SIZE) for _ in range(NUM_SHARED)]
        for kill_at in (None, None, 20):  # the second one finds the beginning of its prompt cached
            prompt = [*shared, *(draw.randrange(1, VOCAB_SIZE) for _ in range(NUM_OWN))]
            await _stream(cluster, client, {**told, "prompt": prompt}, kill_at)


async def _encoders(receiver: OtlpReceiver) -> None:
    from tests.support.checkpoints import checkpoint
    from tests.support.encoder_decoders import texts

    text = max(texts("t5", 8), key=lambda each: len(each.source))
    pools = {name: {"workers": 1} for name in ("encode", "prefill", "decode")}
    settings = {**_SETTINGS, "model.path": str(checkpoint("t5")), "kv.block_size": 8, "pools": pools}
    body = {"model": "tiny", "prompt": list(text.source), "decoder_prompt": list(text.prompt), "max_tokens": 24}
    body |= {"ignore_eos": True, "temperature": 0, "return_token_ids": True}
    async with plain_cluster(settings) as cluster, traced_front(cluster, receiver.endpoint) as client:
        await _stream(cluster, client, body, None)


def run() -> None:
    with otlp_receiver() as receiver:
        asyncio.run(_decoders(receiver))
        asyncio.run(_encoders(receiver))
        rows = receiver.rows()
    order = [root.trace_id for root in roots(rows)]
    kept = {
        name: [row for row in rows if row["trace_id"] == order[index]]
        for name, index in (("disaggregated", 1), ("killed", 2), ("encoder", 3))
    }
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        run()
    PAGE.write_text(page())

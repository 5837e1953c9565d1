"""A route for people: what is on the card, and that it fits the screen."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console, RenderableType

from deploy import route_card
from deploy.openai_schema import RouteReport, WorkerRoute


def report(**changes: object) -> RouteReport:
    worker = WorkerRoute(name="prefill-0", incarnation="0123456789abcdef" * 2, pid=4_000_001)
    fields: dict[str, object] = {
        "request_id": "r",
        "plan": "disaggregated",
        "attempts": 1,
        "prefill": worker,
        "decode": worker.model_copy(update={"name": "decode-0", "pid": 4_000_002}),
        "transport": "nixl",
        "prompt_tokens": 112,
        "prefix_hit_tokens": 32,
        "decode_prefix_hit_tokens": 0,
        "prefill_prefix_hit_tokens": 32,
        "chunks": 3,
        "blocks": 7,
        "bytes": 200_704,
        "transfer_ms": 2.0,
        "skipped_blocks": 5,
        "fetched_from": "decode-1",
        "fetched_blocks": 3,
        "fetched_bytes": 86_016,
        "fetch_ms": 1.5,
        "gb_per_s": 0.1,
        "local_prefill": False,
        "recomputed_tokens": 0,
        "preemptions": 0,
        "spare_used": False,
        "queue_ms": 0.0,
        "prefill_ms": 100.0,
        "ttft_ms": 40.0,
        "itl_ms": 5.0,
    }
    return RouteReport.model_validate(fields | changes)


def shown(renderable: RenderableType, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(renderable)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_an_encoder_has_a_row() -> None:
    fetched = report(encoded_by="encode-1", encoder_tokens=40, encoded_blocks=3, encoded_bytes=9_000, encode_ms=2.5)
    assert "40 tokens read by encode-1, 3 blocks, 9.0 kB in 2.5 ms" in shown(
        route_card.render(fetched, ttft_ms=1.0, itl_ms=None)
    )
    apart = report(prefill=None, encoded_by="encode-1", encoder_tokens=40)
    assert "disaggregated: encode-1 the prompt, decode-0 the answer" in shown(
        route_card.render(apart, ttft_ms=1.0, itl_ms=None)
    )
    own = report(prefill=None, plan="aggregated", encoded_by="decode-0", encoder_tokens=40)
    assert "aggregated: decode-0 did it all" in shown(route_card.render(own, ttft_ms=1.0, itl_ms=None))
    cached = report(encoder_tokens=1)
    assert "1 token, found in the cache of decode-0" in shown(route_card.render(cached, ttft_ms=1.0, itl_ms=None))
    assert "encode" not in shown(route_card.render(report(), ttft_ms=1.0, itl_ms=None))


def test_a_disaggregated_route() -> None:
    text = shown(route_card.render(report(), ttft_ms=123.4, itl_ms=6.28))
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "HTTP ──▶ ingress ──▶ decode-0 ◀── 7 blocks over nixl ── prefill-0",
        "disaggregated: prefill-0 the prompt, decode-0 the answer",
        "prefill-0, pid 4000001, incarnation 0123456789ab",
        "112 tokens, 32 of them a prefix hit",
        "3 blocks, 86.0 kB from the cache of decode-1 in 1.5 ms",
        "in 3 chunks on prefill-0",
        "7 blocks, 200.7 kB over nixl in 2.0 ms, 0.10 GB/s",
        "123 ms after the request",
        "a token every 6.3 ms",
    ):
        assert words in text


def test_an_aggregated_route_moved_nothing() -> None:
    local = report(plan="aggregated", prefill=None, transport="", blocks=0, bytes=0, transfer_ms=0, gb_per_s=0)
    text = shown(route_card.render(local, ttft_ms=1, itl_ms=None))
    assert "HTTP ──▶ ingress ──▶ decode-0 " in text and "aggregated: decode-0 did it all" in text
    assert "nothing" in text and "a token every" not in text and "prefill-0" not in text


def test_detours_are_told() -> None:
    text = shown(
        route_card.render(report(recomputed_tokens=1, preemptions=2, attempts=2), ttft_ms=1, itl_ms=1), width=200
    )
    assert "1 token again on decode-0; preempted 2 times; attempt 2" in " ".join(text.split())


def test_many_routes_are_added_up_by_pair() -> None:
    routes = [report(), report(prompt_tokens=8, prefix_hit_tokens=0, blocks=1, bytes=1000)]
    local = report(plan="aggregated", prefill=None, transport="", prompt_tokens=3, blocks=0, bytes=0)
    text = shown(route_card.render_all([*routes, local]), width=100)
    rows = [line.split() for line in text.splitlines() if "decode-0" in line]
    assert rows == [
        ["itself", "decode-0", "(4000002)", "1", "3", "32", "0", "0", "bytes"],
        "prefill-0 (4000001) decode-0 (4000002) 2 120 32 8 201.7 kB nixl".split(),
    ]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (2_340_000, "2.3 MB"), (5 * 10**9, "5.0 GB")],
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert route_card.size(num_bytes) == text

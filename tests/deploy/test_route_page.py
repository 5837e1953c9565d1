"""How a request was routed, asked of any replica by the id of its answer; sessions by header."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from fastapi import FastAPI

from cluster.exporter import Exporter
from cluster.words_config import WordsConfig
from deploy.route_page import add_route_page, page_of
from tests.support.api import PROMPT, front_door
from tests.support.routing import Stage
from tests.support.scripted_worker import FOREVER

ATTEMPT = (
    "attempt block_size candidates decode encode encode_spare fetches_from follows held_blocks local_reason "
    "num_tokens num_ways prefill spare ways"
)
OUTCOME = (
    "blocks bytes decode decode_prefix_hit_tokens encode_ms encoded_blocks encoded_by encoded_bytes "
    "encoder_tokens encoders_lost fetch_ms fetched_blocks fetched_bytes fetched_from local_prefill "
    "preemptions prefill prefill_ms prefill_prefix_hit_tokens queue_ms recomputed_tokens skipped_blocks "
    "spare_used transfer_ms"
)


@pytest.fixture
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack)


def test_any_replica_tells_how_a_request_was_routed(stage: Stage) -> None:
    workers = [stage.decode(f"decode-{index}", FOREVER) for index in range(2)]
    with front_door(None, policy="kv_aware") as door:
        door.connect(*workers)
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
        answer = httpx.post(f"{door.url}/v1/completions", json=body).raise_for_status().json()
        told = httpx.get(f"{door.url}/v1/requests/{answer['id']}/route").raise_for_status().json()
        assert (told["policy"], told["state"], len(told["attempts"])) == ("kv_aware", "length", 1)
        attempt = told["attempts"][0]
        assert attempt["local_reason"] == "configured" and attempt["num_ways"] == 2
        assert [way["chosen"] for way in attempt["ways"]] == [True, False]
        assert {each["name"] for each in attempt["candidates"]} == {"decode-0", "decode-1"}
        assert attempt["ways"][0]["total_blocks"] == sum(
            attempt["ways"][0][f"{term}_blocks"] for term in ("prefill", "queue", "decode", "transfer")
        )
        assert told["outcome"]["decode"] == attempt["decode"]
        assert " ".join(sorted(attempt)) == ATTEMPT and " ".join(sorted(told["outcome"])) == OUTCOME

        exporter = Exporter(door.metrics, WordsConfig(), page_of(door.router.route))
        address = exporter.start()
        try:
            other = FastAPI()
            add_route_page(other, lambda _: None, lambda: ["127.0.0.1:1", address])  # nobody listens on the first

            async def ask(answer_id: str) -> httpx.Response:
                transport = httpx.ASGITransport(other)
                async with httpx.AsyncClient(transport=transport, base_url="http://sluice") as client:
                    return await client.get(f"/v1/requests/{answer_id}/route")

            assert asyncio.run(ask(answer["id"])).json() == told
            for unknown in ("cmpl-nobody", "no%20id"):
                missing = asyncio.run(ask(unknown))
                assert missing.status_code == 404 and "router.kept_routes" in missing.json()["error"]["message"]
            assert httpx.get(f"http://{address}/requests/nobody/route").status_code == 404
            assert "sluice_router_indexed_blocks" in httpx.get(f"http://{address}/metrics").text
        finally:
            exporter.stop()


def test_requests_of_one_session_go_to_one_worker(stage: Stage) -> None:
    workers = [stage.decode(f"decode-{index}", FOREVER) for index in range(4)]
    with front_door(None, policy="round_robin", affinity_header="x-session") as door:
        door.connect(*workers)
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1}
        for _ in range(6):
            httpx.post(f"{door.url}/v1/completions", json=body, headers={"X-Session": "a"}).raise_for_status()
        assert sorted(len(worker.submits) for worker in workers) == [0, 0, 0, 6]
        for _ in range(4):
            httpx.post(f"{door.url}/v1/completions", json=body).raise_for_status()
        assert sorted(len(worker.submits) for worker in workers) == [1, 1, 1, 7]

"""A request whose task Serve cancels, because its client is gone, is counted once and left nowhere."""

from __future__ import annotations

import asyncio
import json

from starlette.types import Message

from deploy.openai_api import create_app
from tests.support.api import PROMPT, FrontDoor
from tests.support.routing import eventually
from tests.support.scripted_worker import ScriptedWorker, Wait


def test_a_cancelled_task_is_counted_and_cancels_its_request(door: FrontDoor, worker: ScriptedWorker) -> None:
    worker.text, worker.script = None, [Wait()]
    before = door.outcomes("cancelled")
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 8}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}

    async def cancel_while_it_waits() -> None:
        messages: list[Message] = [{"type": "http.request", "body": body}]

        async def receive() -> Message:
            return messages.pop() if messages else await asyncio.Future()

        async def send(message: Message) -> None:
            raise AssertionError(message)

        task = asyncio.create_task(create_app(door.service)(scope, receive, send))
        async with asyncio.timeout(10):
            while not worker.submits:
                await asyncio.sleep(0.002)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    door.run(cancel_while_it_waits())
    assert door.metrics.value("sluice_ingress_open_requests") == 0
    assert door.outcomes("cancelled") == before + 1
    door.run(eventually(lambda: bool(worker.cancels)))

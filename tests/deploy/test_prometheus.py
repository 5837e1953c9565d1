"""The list of targets as Prometheus reads it."""

from __future__ import annotations

import asyncio

import httpx
from fastapi import FastAPI

from cluster.exporter import Export
from cluster.metrics import Metrics
from deploy.prometheus import PATH, add_targets

WORKER = Export(name="mixed-0", incarnation="ab", address="127.0.0.1:20003", roles=("prefill", "decode"))
REPLICA = Export(name="ingress-1", incarnation="cd", address="[::1]:20004", roles=("ingress",))


def ask(app: FastAPI) -> httpx.Response:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://sluice") as client:
            return await client.get(PATH)

    return asyncio.run(get())


def test_the_form_and_that_it_is_asked_anew() -> None:
    app = FastAPI()
    exports = [WORKER]
    add_targets(app, "chat", "tiny", lambda: exports)
    answer = ask(app)
    assert answer.headers["content-type"] == "application/json"
    common = {"app": "chat", "model": "tiny"}
    worker = {
        "targets": ["127.0.0.1:20003"],
        "labels": {**common, "role": "prefill_decode", "name": "mixed-0", "incarnation": "ab"},
    }
    assert answer.json() == [worker]
    exports.append(REPLICA)
    replica = {
        "targets": ["[::1]:20004"],
        "labels": {**common, "role": "ingress", "name": "ingress-1", "incarnation": "cd"},
    }
    assert ask(app).json() == [worker, replica]
    exports.clear()
    assert ask(app).json() == []


def test_no_label_of_a_target_hides_one_of_a_metric() -> None:
    app = FastAPI()
    add_targets(app, "chat", "tiny", lambda: [WORKER])
    ((target,),) = (ask(app).json(),)
    metrics = Metrics()
    used = {label for metric in vars(metrics).values() for label in getattr(metric, "_labelnames", ())}
    assert used and used.isdisjoint({*target["labels"], "job", "instance"})

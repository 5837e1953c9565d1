"""A front door with traces over the router of a plain cluster."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import uvicorn

from cluster.log import Log
from cluster.traces_config import TracesConfig
from deploy.api_service import ApiService
from deploy.openai_api import create_app
from deploy.served_model import ServedModel
from deploy.traces import Traces
from tests.support.plain_cluster import PlainCluster

APP = "traced"


@asynccontextmanager
async def traced_front(cluster: PlainCluster, endpoint: str) -> AsyncIterator[httpx.AsyncClient]:
    """Its traces are sent when this ends."""
    config = cluster.config
    log = Log.open("ingress", config.log)
    model = replace(ServedModel.read(config), name="tiny")
    traced = TracesConfig(endpoint=endpoint, sample_rate=1.0)
    traces = Traces(traced, app=APP, instance="ingress-0", model="tiny", log=log)
    service = ApiService(
        router=cluster.router,
        tokenizer=None,
        model=model,
        http=config.http,
        limits=config.limits,
        metrics=cluster.metrics,
        log=log,
        traces=traces,
    )
    app = uvicorn.Config(create_app(service), log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(app)
        serving = asyncio.create_task(server.serve([listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
                yield client
        finally:
            server.should_exit = True
            await serving
            await asyncio.to_thread(traces.stop)

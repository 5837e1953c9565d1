"""A deployment for one job with its API on a port of the loopback interface, in a thread beside the job's own.

The workers are processes of their own session: Ctrl-C in the terminal reaches the job alone.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import uvicorn

from cluster.config import SluiceConfig
from deploy import offline
from deploy.api_service import ApiService
from deploy.openai_api import create_app

_HOST = "127.0.0.1"


class LocalFront:
    """`start` once, `stop` always, also after a failure or an exception in `start`."""

    def __init__(self, config: SluiceConfig, directory: Path, progress: Callable[[str], None]) -> None:
        """Logs go to `directory`/log. `progress` is called in the thread."""
        self._config = config
        self._directory = directory
        self._progress = progress
        self._ready: Future[str] = Future()
        self._failure: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._job: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="sluice-front")

    def start(self) -> str:
        """The URL, once the first request would succeed. Raises what `offline.run` does."""
        job = offline.run(self._config, self._directory, self._serve, self._progress, with_tokenizer=True)
        self._job = self._loop.create_task(job)
        self._thread.start()
        return self._ready.result()

    def check(self) -> None:
        """Raises what ended the deployment, if it has ended by itself."""
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Ends open requests, the workers and the thread; idempotent."""
        if self._job is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._job.cancel)
            self._thread.join()

    def _run(self) -> None:
        assert self._job is not None
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(asyncio.wait([self._job]))
            if not self._job.cancelled():
                self._failure = self._job.exception()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
        if not self._ready.done():
            self._ready.set_exception(self._failure or asyncio.CancelledError())

    async def _serve(self, service: ApiService) -> None:
        listener = socket.socket()
        listener.bind((_HOST, 0))
        listener.listen()  # from here on a connection waits, if it must, and is not refused
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None, access_log=False, lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        self._ready.set_result(f"http://{_HOST}:{listener.getsockname()[1]}")
        try:
            await asyncio.shield(serving)
        finally:
            server.should_exit = server.force_exit = True
            await serving

"""The thread that the words plane lives on: one event loop and one heart per process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Protocol, Self, TypeVar

from cluster.heart import Heart, StepAge, no_engine
from cluster.tls import Tls
from cluster.words_config import WordsConfig

T = TypeVar("T")


class _Closable(Protocol):
    async def aclose(self) -> None: ...


class WordsThread:
    """One event loop in a daemon thread, and the heart. Servers and dialers stop with it.

    `step_age` is called on the heart thread: seconds since the engine last stepped, and whether it has work.
    """

    def __init__(self, step_age: Callable[[], StepAge] = no_engine, config: WordsConfig | None = None) -> None:
        self.config = config or WordsConfig()
        self.tls = Tls.read(self.config.tls)
        self.step_age = step_age
        self.heart = Heart(step_age, interval_s=self.config.heartbeat_s)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="sluice-words", daemon=True)
        self._parts: list[_Closable] = []

    def start(self) -> Self:
        self._thread.start()
        self.heart.start()
        return self

    def run(self, coroutine: Coroutine[object, object, T]) -> Future[T]:
        """Starts a coroutine on the words thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def wait(self, coroutine: Coroutine[object, object, T]) -> T:
        """Runs a coroutine on the words thread to its end; from any other thread."""
        assert threading.current_thread() is not self._thread, "would wait for itself"
        return self.run(coroutine).result()

    def post(self, call: Callable[..., None], *args: object) -> None:
        """Calls something on the words thread, soon."""
        self._loop.call_soon_threadsafe(call, *args)

    def adopt(self, part: _Closable) -> None:
        """`part` is closed when the thread stops, unless it was before."""
        self._parts.append(part)

    def stop(self) -> None:
        """Ends every session, then the threads. May be called twice."""
        if self._loop.is_closed():
            return
        self.heart.stop()
        if self._thread.ident is not None:
            self.wait(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _close(self) -> None:
        for part in self._parts:
            await part.aclose()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

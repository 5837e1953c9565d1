"""Fresh processes that benchmarks talk to through a pipe. Give `main` a module-level function: it is found by name."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

ANSWER_S = 180.0


@contextmanager
def process(main: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    """Runs `main(pipe, *arguments)`; yields the other end of the pipe. It should have ended when the block does."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    running = context.Process(target=main, args=(theirs, *arguments), daemon=True)
    running.start()
    theirs.close()  # so that the death of the process is the end of the pipe
    try:
        yield pipe
        running.join(ANSWER_S)
    finally:
        running.kill()
        running.join()
        pipe.close()


def receive(pipe: Connection) -> Any:
    """What the other side sends next. Raises TimeoutError, and EOFError when it died."""
    if not pipe.poll(ANSWER_S):
        raise TimeoutError(f"a process of the benchmark did not answer within {ANSWER_S:g} s")
    return pipe.recv()

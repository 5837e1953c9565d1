"""Keeps the screen to ourselves: what libraries and child processes write goes to a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from cluster.errors import SluiceError

_MAX_COLUMNS = 100


@contextmanager
def logged(log: Path, *, screen: int = 1) -> Iterator[Console]:
    """`silence`, whose file is gone afterwards unless something failed: then the error names it.

    Raises SluiceError, its own when `log` cannot be written.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    except OSError as error:
        raise SluiceError(f"{log} cannot be written ({error.strerror}); name another place") from None
    try:
        with silence(log, screen=screen) as console:
            yield console
    except SluiceError as error:
        if log.stat().st_size:
            raise SluiceError(f"{error}\nWhat was said meanwhile: {log}") from error
        log.unlink()
        raise
    log.unlink()


@contextmanager
def silence(log: Path, *, screen: int = 1) -> Iterator[Console]:
    """Inside, file descriptors 1 and 2 lead to `log`; the console yielded writes where `screen` did.

    Processes started inside inherit the file. For the main thread of a command: it changes the whole process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        # UTF-8 whatever the locale says: a question mark is better than a traceback.
        with os.fdopen(os.dup(saved[screen - 1]), "w", encoding="utf-8", errors="replace") as file:
            console = Console(file=file, highlight=False)
            console.width = min(console.width, _MAX_COLUMNS)
            yield console
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(saved, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(sink)

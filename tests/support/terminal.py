"""A command of ours on a terminal of its own, as a person has it: typed to, and read until something shows."""

from __future__ import annotations

import os
import pty
import re
import select
import sys
import time
from types import TracebackType

import psutil

from tests.support.commands import DEADLINE_S, ROOT

CTRL_C, CTRL_D = "\x03", "\x04"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")


class Terminal:
    """`python -m deploy …` whose standard streams are a terminal. Ended with the context."""

    def __init__(self, *words: str) -> None:
        self.shown = ""  # all of it, without control sequences
        self._seen = 0
        self._pid, self._screen = pty.fork()
        if self._pid == 0:
            os.chdir(ROOT)
            os.environ.update(TERM="xterm", COLUMNS="100")
            os.execv(sys.executable, [sys.executable, "-m", "deploy", *words])

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def until(self, pattern: str) -> re.Match[str]:
        """The first match in what is shown after the last one."""
        deadline = time.monotonic() + DEADLINE_S
        while (found := re.compile(pattern).search(self.shown, self._seen)) is None:
            ready, _, _ = select.select([self._screen], [], [], max(0.0, deadline - time.monotonic()))
            assert ready and self._read(), f"{pattern!r} is not shown: {self.shown}"
        self._seen = found.end()
        return found

    def until_it_waits(self) -> None:
        """Until it sleeps, for a key after a prompt. Between the two, Python hears of Ctrl-C with the next key only."""
        deadline = time.monotonic() + DEADLINE_S
        while psutil.Process(self._pid).status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < deadline, f"it never sleeps: {self.shown}"

    def wait(self) -> int:
        """The exit status."""
        while self._read():
            pass
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    def _read(self) -> bool:
        """Whether there was something; False at its end."""
        try:
            data = os.read(self._screen, 1 << 16)
        except OSError:  # how a terminal says that nobody is there any more
            return False
        self.shown += _CONTROL.sub("", data.decode(errors="replace"))
        return bool(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._screen)  # hangs up
        if self._pid:
            os.waitpid(self._pid, 0)

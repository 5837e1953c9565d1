"""Commands of ours as a shell would start them, and every process that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
DEADLINE_S = 180.0
MARK = "SLUICE_LOCAL_CLUSTER"  # in the environment of everything in a Ray cluster of ours


class Command:
    """`python -m deploy …` in a process group of its own; its descendants are noted for as long as it runs."""

    def __init__(self, *words: str, stdin: str | None = None) -> None:
        """`stdin`: all that it may read."""
        self._stdin = stdin
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deploy", *words],
            cwd=ROOT,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self.family: set[psutil.Process] = set()
        self.output = self.errors = ""
        self._ended = threading.Event()
        self._noticed = threading.Condition()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def interrupt(self) -> None:
        """Ctrl-C: the whole group gets it."""
        os.killpg(self._process.pid, signal.SIGINT)

    def kill(self) -> None:
        """It alone, without a chance to clean up."""
        self._process.kill()

    def descendant(self, holds: Callable[[list[str]], bool]) -> psutil.Process:
        """The first one with such a command line, as soon as there is one."""
        found: list[psutil.Process] = []

        def look() -> bool:
            found.extend(p for p in self.family if p.is_running() and holds(_command_line(p)))
            return bool(found)

        with self._noticed:
            assert self._noticed.wait_for(look, DEADLINE_S), f"no such process among {self.family}"
        return found[0]

    def until(self, holds: Callable[[], bool]) -> bool:
        """Whether `holds` came true while the command ran."""
        while not holds() and self._process.poll() is None:
            self._ended.wait(0.005)
        return holds()

    def wait(self) -> int:
        """The exit status. `output` and `errors` are set afterwards."""
        try:
            self.output, self.errors = self._process.communicate(self._stdin, timeout=DEADLINE_S)
        finally:
            self._ended.set()
            if self._process.poll() is None:
                self._process.kill()
        self._watcher.join()
        return self._process.returncode

    def left(self) -> list[tuple[int, list[str]]]:
        """Descendants that still run, after `wait`."""
        _, alive = psutil.wait_procs(list(self.family), timeout=30)
        return [(p.pid, _command_line(p)) for p in alive if p.status() != psutil.STATUS_ZOMBIE]

    def _watch(self) -> None:
        """Ray's processes leave the tree of their parents: those are known by their environment."""
        marks: set[str] = set()
        while not self._ended.wait(0.1):
            try:
                below = psutil.Process(self._process.pid).children(recursive=True)
            except psutil.NoSuchProcess:
                return
            marks |= {mark for process in below if (mark := _mark(process))}
            others = [p for p in psutil.process_iter() if marks and _mark(p) in marks]
            with self._noticed:
                self.family |= {*below, *others}
                self._noticed.notify_all()


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return None


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return []

"""The whole app in Ray clusters of its own, through the command line: real processes, real HTTP, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.checkpoints import checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
READY_S = 100.0
STOP_S = 60.0


class Served:
    """`python -m deploy serve` in a process group of its own, as a shell would start it."""

    def __init__(self, model: Path, *overrides: str) -> None:
        settings = [word for override in overrides for word in ("--set", override)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy", "serve", "--model", str(model), "--port", "0", *settings],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.errors: list[str] = []
        self._written = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            with self._written:
                self.errors.append(line)
                self._written.notify_all()

    def wait_for_error(self, text: str) -> None:
        """Until the command has written `text` to stderr, where it shows its progress."""
        with self._written:
            assert self._written.wait_for(lambda: any(text in line for line in self.errors), READY_S), self.errors

    def url(self) -> str:
        assert self.process.stdout is not None
        alarm = threading.Timer(READY_S, self.process.kill)
        alarm.start()
        line = self.process.stdout.readline()
        alarm.cancel()
        assert line.startswith("ready http://"), (line, self.errors[-20:])
        return line.split()[1]

    def family(self) -> list[psutil.Process]:
        """The command, everything below it, and everything that works in its cluster's directory."""
        command = psutil.Process(self.process.pid)
        below = command.children(recursive=True)
        marks = {process.environ().get("SLUICE_LOCAL_CLUSTER") for process in below} - {None}
        assert len(marks) == 1
        self.directory = Path(str(marks.pop()))
        others = [
            p for p in psutil.process_iter(["cmdline"]) if str(self.directory) in " ".join(p.info["cmdline"] or ())
        ]
        return list({p.pid: p for p in [command, *below, *others]}.values())

    def ended(self, family: list[psutil.Process]) -> int:
        """The exit status, after checking that nothing is left."""
        status = self.process.wait(STOP_S)
        left = [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert [(p.pid, p.cmdline()) for p in left] == []
        assert not self.directory.exists()
        return status


@contextmanager
def served(model: Path, *overrides: str) -> Iterator[Served]:
    command = Served(model, *overrides)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.terminate()
            command.process.wait(STOP_S)


def exposed(family: list[psutil.Process]) -> list[str]:
    """What listens on more than the loopback interface, apart from what Serve offers no address for."""
    return [
        f"{process.name()} {connection.laddr}"
        for process in family
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and not connection.laddr.ip.endswith("127.0.0.1")
        and not process.name().startswith(("haproxy", "ray::ServeRepl"))
    ]


def complete(url: str, **options: object) -> httpx.Response:
    body = {"model": "model", "prompt": [5, 6, 7, 8] * 4, "max_tokens": 8, "temperature": 0, **options}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def test_an_app_serves_drains_and_leaves_nothing() -> None:
    model = checkpoint("llama")
    settings = ("kv.num_blocks=64", "kv.block_size=8", "model.served_name=model")
    with served(model, *settings, "http.replicas=2") as app:
        url, family = app.url(), app.family()
        assert exposed(family) == []
        answer = complete(url, return_route=True)
        assert answer.status_code == 200
        route = answer.json()["usage"]["sluice"]
        assert route["transport"] == "nixl"
        assert {route["prefill"]["pid"], route["decode"]["pid"]} < {p.pid for p in family}

        body = {"model": "model", "prompt": [5, 6, 7, 8], "max_tokens": 200, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            lines = (line for line in stream.iter_lines() if line)
            next(lines)
            os.killpg(app.process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group; an open stream ends first
            assert list(lines)[-1] == "data: [DONE]"
        assert app.ended(family) == 0


def test_sigterm_while_starting_leaves_nothing() -> None:
    with served(checkpoint("llama"), "kv.num_blocks=64") as command:
        command.wait_for_error("starting the front door")
        family = command.family()
        command.process.terminate()
        assert command.ended(family) == 0, command.errors


@pytest.mark.full
def test_a_model_that_cannot_be_loaded_ends_the_command_with_the_reason(tmp_path: Path) -> None:
    """The front door reads config.json only: the workers are the ones that find the weights missing."""
    model = checkpoint("llama")
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with served(tmp_path) as command:
        assert command.process.wait(READY_S) == 1
        command._reader.join(10)
        assert "does not start: CheckpointError" in command.errors[-1]

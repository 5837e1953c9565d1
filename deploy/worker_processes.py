"""The workers of a config as plain processes of this machine, without Ray: for commands that live for one job."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster.config import SluiceConfig
from cluster.errors import SluiceError
from cluster.membership import Member, Membership

_MAX_DEATHS = 3  # of one worker: whatever kills it is not going to stop
_END_S = 10.0


class WorkerProcesses:
    """Starts every worker, replaces those that die, and tells all of them and `on_members` who is alive.

    Belongs to one event loop. What the processes write goes to `directory`/log.
    """

    def __init__(
        self, config: SluiceConfig, directory: Path, secret: str, on_members: Callable[[Membership], None]
    ) -> None:
        self._log = directory / "log"
        self._secret = secret
        self._config = config
        self._config_path = directory / "config.yaml"  # JSON, which is YAML too
        self._on_members = on_members
        self._processes: dict[str, Process] = {}
        self._members: dict[str, Member] = {}
        self._version = 0

    async def run(self) -> None:
        """Until cancelled; then every process has ended. Raises SluiceError when a worker cannot be kept alive."""
        self._config_path.write_text(self._config.model_dump_json())
        pools = self._config.pools.items()
        names = [(pool, f"{pool}-{index}") for pool, spec in pools for index in range(spec.workers)]
        tasks = [asyncio.create_task(self._keep(pool, name)) for pool, name in names]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(self._end(process) for process in self._processes.values()))

    async def _keep(self, pool: str, name: str) -> None:
        num_deaths = 0
        while True:
            process = await self._start(pool, name)
            assert process.stdout is not None
            if line := await process.stdout.readline():
                self._members[name] = Membership.from_wire(line).members[0]
                self._publish()
            status = await process.wait()
            served = self._members.pop(name, None) is not None
            num_deaths += 1
            gave_up = not served and status > 0  # with its reason, which will not change
            if gave_up or num_deaths == _MAX_DEATHS:
                raise SluiceError(self._why(name, status, gave_up=gave_up))
            self._publish()

    async def _start(self, pool: str, name: str) -> Process:
        words = ["-m", "workers.standalone", "--config", str(self._config_path), "--pool", pool, "--name", name]
        with self._log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *words,
                stdin=PIPE,
                stdout=PIPE,
                stderr=log,
                env={**os.environ, self._config.words.secret_env: self._secret},
                start_new_session=True,  # Ctrl-C is ours: they end when their standard input does
            )
        self._processes[name] = process
        return process

    def _publish(self) -> None:
        self._version += 1
        membership = Membership(self._version, tuple(self._members.values()))
        for name in self._members:
            pipe = self._processes[name].stdin
            assert pipe is not None
            with suppress(OSError, RuntimeError):  # it has just died: its keeper will notice
                pipe.write(membership.to_wire() + b"\n")
        self._on_members(membership)

    def _why(self, name: str, status: int, *, gave_up: bool) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.startswith("error: ")), "")
        if gave_up and last:
            return f"{name}: {last.removeprefix('error: ')}"
        what = "did not start" if gave_up else f"died {_MAX_DEATHS} times"
        return f"{name} {what} (exit status {status}); try `python -m deploy doctor`"

    async def _end(self, process: Process) -> None:
        if process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _END_S)
        except TimeoutError:
            process.kill()
            await process.wait()

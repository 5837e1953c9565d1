"""How far a job is: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from deploy.batch import Batch

_PLAIN_S = 30.0  # between two lines, unless a tenth of the job was done meanwhile


class BatchProgress:
    """A context manager around a job of `num_lines`, of which `num_kept` were done before."""

    def __init__(self, console: Console, batch: Batch, num_lines: int, num_kept: int) -> None:
        self._console = console
        self._batch = batch
        self._num_lines = num_lines
        self._num_kept = num_kept
        self._started_at = self._said_at = time.monotonic()
        self._said_tenths = 10 * num_kept // max(1, num_lines)
        self._bar = Progress(
            TextColumn("  answering"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            _Pace(self),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_lines, completed=num_kept)

    def line_done(self) -> None:
        self._bar.advance(self._task)
        if self._console.is_terminal:
            return
        num_done, now = self._num_kept + self._batch.summary.num_lines, time.monotonic()
        tenths = 10 * num_done // self._num_lines
        if tenths > self._said_tenths or now - self._said_at > _PLAIN_S:
            self._said_tenths, self._said_at = tenths, now
            self._console.print(f"  answering: {num_done} of {self._num_lines} lines, {self.pace()}")

    @property
    def tokens_per_s(self) -> float:
        elapsed_s = time.monotonic() - self._started_at
        return self._batch.num_tokens / elapsed_s if elapsed_s > 0 else 0.0

    def pace(self) -> str:
        """Tokens per second, and the time left if the other lines are like those that are done."""
        num_done = self._batch.summary.num_lines
        num_left = self._num_lines - self._num_kept - num_done
        rate = f"{self.tokens_per_s:.0f} tok/s"
        if not num_done:
            return rate
        left_s = round(num_left * (time.monotonic() - self._started_at) / num_done)
        return f"{rate}, {left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02} left"

    def __enter__(self) -> BatchProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class _Pace(ProgressColumn):
    def __init__(self, progress: BatchProgress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(self._progress.pace())

"""Progress of a start or an end on the screen: what happens now turns, what is done stays with its time."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.spinner import Spinner


class Steps:
    """`begin` as often as one likes; a step is known by its words before the colon. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._spinner = Spinner("dots")
        self._name = ""
        self._began_at = 0.0

    def begin(self, text: str) -> None:
        """Ends the step before, unless this is the same one with other details."""
        name = text.partition(":")[0]
        if name != self._name:
            self.done()
            self._name, self._began_at = name, time.monotonic()
        if not self._console.is_terminal:
            return
        self._spinner.update(text=escape(text))
        if self._live is None:
            # What others print belongs into the log, not above the spinner.
            self._live = Live(
                Padding(self._spinner, (0, 2)),
                console=self._console,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    def done(self, remark: str = "") -> None:
        """Ends the step, if one is open, and leaves its line."""
        self._stop()
        if self._name:
            elapsed_s = time.monotonic() - self._began_at
            text = f"{self._name}{': ' if remark else ''}{remark}"
            width = self._console.width - 16
            self._console.print(f"  [green]✓[/] {escape(text):<{width}} [dim]{elapsed_s:6.1f} s[/]")
            self._name = ""

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.done()
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

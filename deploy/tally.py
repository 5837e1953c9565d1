"""What one HTTP request did, as its client saw it: for the ingress's metrics and the route that a client asks for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cluster.metrics import Metrics, Outcome
from deploy.quota import Visit
from router.journal import Journal

if TYPE_CHECKING:  # OpenTelemetry is imported where traces are on
    from deploy.traces import Trace


class Pace:
    """When the tokens of one sequence came."""

    def __init__(self) -> None:
        self.first_at: float | None = None
        self.last_at = 0.0
        self.num_tokens = 0

    @property
    def itl_ms(self) -> float | None:
        """Mean time between tokens; None with a single one."""
        if self.first_at is None or self.num_tokens < 2:
            return None
        return 1000 * (self.last_at - self.first_at) / (self.num_tokens - 1)


class Tally:
    """One request in the ingress's metrics, from its arrival to its end, counted once. `trace` None: it has none."""

    def __init__(self, metrics: Metrics, trace: Trace | None = None) -> None:
        self._metrics = metrics
        self.arrived_at = time.monotonic()
        self.num_tokens = 0
        self._first_at: float | None = None
        self._open = True
        self._visit: Visit | None = None
        self._trace = trace
        metrics.open_requests.inc()

    def charge_to(self, visit: Visit) -> None:
        """It counts for an API key, until its end."""
        self._visit = visit

    def journal(self) -> Journal | None:
        """For one sequence, where the request is traced."""
        return None if self._trace is None else self._trace.journal()

    def prompt(self, num_tokens: int) -> None:
        """A prompt was accepted."""
        self._metrics.prompt_tokens.inc(num_tokens)
        self._spend(num_tokens)

    def tokens(self, num_tokens: int, pace: Pace) -> None:
        """They just arrived, together, for one sequence; the time since its last ones is spread over them."""
        if not num_tokens:
            return
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            self._metrics.ttft.observe(now - self.arrived_at)
        if pace.first_at is None:
            pace.first_at = now
        else:
            for _ in range(num_tokens):
                self._metrics.inter_token.observe((now - pace.last_at) / num_tokens)
        pace.last_at = now
        pace.num_tokens += num_tokens
        self.num_tokens += num_tokens
        self._metrics.generated_tokens.inc(num_tokens)
        self._spend(num_tokens)

    def end(self, outcome: Outcome) -> None:
        """The first call counts."""
        if not self._open:
            return
        self._open = False
        if self._visit is not None:
            self._visit.leave()
        if self._trace is not None:
            self._trace.end(outcome)
        self._metrics.open_requests.dec()
        self._metrics.requests.labels(outcome).inc()
        if outcome is Outcome.OK:
            self._metrics.end_to_end.observe(time.monotonic() - self.arrived_at)

    def _spend(self, num_tokens: int) -> None:
        if self._visit is not None:
            self._visit.spend(num_tokens)

    def ttft_ms(self, pace: Pace | None = None) -> float:
        """From the request's arrival to the first token, of one sequence or of any; 0 while there is none."""
        first_at = self._first_at if pace is None else pace.first_at
        return 0.0 if first_at is None else 1000 * (first_at - self.arrived_at)

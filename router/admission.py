"""Which requests one ingress replica runs now, which wait, and which are refused at once.

`limits.max_requests` run and `limits.max_queued` wait, over all replicas, divided by the live ones. Those that wait are
taken in the order of `router.fair_queue`. A request whose first token cannot be expected in time is refused when it
comes, not after it has waited: the work that it would have displaced is done for somebody whom it still serves.

The work that waits is what these refusals bound, so a step of load fills it up to the limit and from then on as much
comes in as is done. Reports are late and other replicas hear the same ones: a replica that is not alone takes only its
part of the room that is left (`router.forecast.Pace`), or all would swing together.

Pure: no clock, no loop; one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from cluster.config import LimitsConfig
from cluster.errors import Busy
from router.fair_queue import Entry, FairQueue
from router.forecast import Outlook, Pace

_MEMORY: Final = 0.1  # weight of the newest duration in the running mean
_MIN_RETRY_S: Final = 1.0
_MAX_RETRY_S: Final = 30.0
_NO_OUTLOOK: Final = Outlook()


@dataclass(frozen=True, slots=True, kw_only=True)
class Applicant:
    """`admit` is called once, when the request may run: from `enter` itself, or when another one leaves."""

    admit: Callable[[], None]
    client: str = ""  # whom it counts for; requests of clients without a name count for one
    weight: int = 1  # of the client's share
    priority: int = 0  # among the client's own, larger first
    num_tokens: int = 1
    within_s: float | None = None  # its first token is worth nothing later


class State(Enum):
    WAITING = auto()
    RUNNING = auto()
    GONE = auto()


@dataclass(slots=True, eq=False)
class Place:
    """One request that was let in."""

    applicant: Applicant
    entered_at: float
    state: State = State.WAITING
    admitted_at: float = 0.0
    _entry: Entry[Place] | None = None


class Admission:
    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._num_replicas = 1
        self._num_running = 0
        self._pace = Pace()
        self._queue: FairQueue[Place] = FairQueue()
        self._mean_s = 0.0  # that a request runs; 0: none has ended

    @property
    def num_open(self) -> int:
        return self._num_running + len(self._queue)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def max_running(self) -> int:
        return max(1, self._limits.max_requests // self._num_replicas)

    @property
    def max_waiting(self) -> int:
        return -(-self._limits.max_queued // self._num_replicas)

    @property
    def is_full(self) -> bool:
        """Whether nobody more may run or wait."""
        return self._num_running >= self.max_running and len(self._queue) >= self.max_waiting

    def set_replicas(self, num_replicas: int, now: float) -> None:
        """Requests beyond a lowered share go on; only new ones are refused."""
        self._num_replicas = max(1, num_replicas)
        self._fill(now)

    def enter(self, applicant: Applicant, now: float, outlook: Outlook = _NO_OUTLOOK) -> Place:
        """Raises Busy. `outlook`: were it to run now."""
        full = self._num_running >= self.max_running
        if self.is_full:
            waiting = (
                f" and {len(self._queue)} wait, the limit of which is {self.max_waiting}" if self.max_waiting else ""
            )
            raise Busy(
                f"{self._num_running} requests are open here and the limit is {self.max_running}{waiting}; retry later",
                retry_after_s=_retry_s(self._slot_s()),
            )
        expected_s = outlook.first_token_s + (self._slot_s() * (1 + len(self._queue)) if full else 0.0)
        if applicant.within_s is not None and not self._in_time(applicant.within_s, expected_s, outlook, now):
            raise Busy(
                f"the first token is expected in {expected_s:.1f} s and wanted within {applicant.within_s:g} s; "
                "retry later, or allow more time",
                retry_after_s=_retry_s(expected_s - applicant.within_s),
                limit="predicted_ttft",
            )
        self._pace.spend(outlook.num_tokens)
        place = Place(applicant, now)
        place._entry = self._queue.push(
            place,
            key=applicant.client,
            cost=applicant.num_tokens,
            priority=applicant.priority,
            weight=applicant.weight,
        )
        self._fill(now)
        return place

    def generated(self, place: Place, num_tokens: int) -> None:
        """Its client has got more than was known when it was let in, while others may wait."""
        self._queue.charge(place.applicant.client, num_tokens)

    def leave(self, place: Place, now: float) -> None:
        """It has ended, in whatever state. Idempotent."""
        state, place.state = place.state, State.GONE
        if state is State.WAITING:
            assert place._entry is not None
            self._queue.remove(place._entry)
        elif state is State.RUNNING:
            self._num_running -= 1
            lasted_s = now - place.admitted_at
            self._mean_s += (_MEMORY if self._mean_s else 1.0) * (lasted_s - self._mean_s)
            self._fill(now)

    def _fill(self, now: float) -> None:
        while len(self._queue) and self._num_running < self.max_running:
            place = self._queue.pop()
            place.state = State.RUNNING
            place.admitted_at = now
            self._num_running += 1
            place.applicant.admit()

    def _in_time(self, within_s: float, expected_s: float, outlook: Outlook, now: float) -> bool:
        if expected_s > within_s:
            return False
        part = outlook.tokens_per_s / self._num_replicas
        return self._num_replicas == 1 or self._pace.allows(part, outlook.first_token_s / within_s, now)

    def _slot_s(self) -> float:
        """About when the next of the running requests ends, if they end as evenly as they lasted."""
        return self._mean_s / self.max_running


def _retry_s(wait_s: float) -> float:
    return min(_MAX_RETRY_S, max(_MIN_RETRY_S, wait_s))

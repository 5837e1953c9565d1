"""Where requests come in: the admission on the router's clock, and what it does as metrics."""

from __future__ import annotations

import asyncio

from cluster.config import LimitsConfig
from cluster.errors import Busy
from cluster.metrics import Metrics
from router.admission import Admission, Applicant, Place
from router.dispatcher import Dispatcher
from router.fleet import Fleet
from router.flight import Flight, State
from router.forecast import Outlook, outlook
from router.navigator import Navigator


class Entrance:
    """The router's loop only."""

    def __init__(
        self, limits: LimitsConfig, fleet: Fleet, navigator: Navigator, dispatcher: Dispatcher, metrics: Metrics
    ) -> None:
        self._admission = Admission(limits)
        self._max_ttft_s = limits.max_ttft_s
        self._fleet = fleet
        self._navigator = navigator
        self._dispatcher = dispatcher
        self._metrics = metrics

    @property
    def num_open(self) -> int:
        return self._admission.num_open

    @property
    def is_full(self) -> bool:
        return self._admission.is_full

    def set_replicas(self, num_replicas: int) -> None:
        self._admission.set_replicas(num_replicas, _now())
        self._show()

    def enter(self, flight: Flight) -> Place:
        """Its turn comes now or later, unless it has ended by then. Raises Busy."""
        request, arrived_at = flight.request, _now()

        def admit() -> None:
            self._metrics.admission_wait.observe(_now() - arrived_at)
            if request.journal is not None:
                request.journal.admitted()
            if flight.state is State.PLACING:
                self._dispatcher.place(flight)

        wanted = [limit for limit in (request.deadline_s, self._max_ttft_s) if limit is not None]
        within_s = min(wanted, default=None)
        applicant = Applicant(
            admit=admit,
            client=request.client,
            weight=request.weight,
            priority=request.priority,
            num_tokens=len(request.prompt_token_ids) + len(request.encoder_token_ids),
            within_s=within_s,
        )
        try:
            place = self._admission.enter(applicant, arrived_at, self._outlook(flight, within_s))
        except Busy as error:
            self._metrics.rejections.labels(error.limit).inc()
            raise
        self._show()
        return place

    def generated(self, place: Place, num_tokens: int) -> None:
        self._admission.generated(place, num_tokens)

    def leave(self, place: Place) -> None:
        self._admission.leave(place, _now())
        self._show()

    def _outlook(self, flight: Flight, within_s: float | None) -> Outlook:
        """What is cached is looked up only where it decides."""
        if within_s is None:
            return Outlook()
        candidates = self._fleet.candidates()
        whole = outlook(flight.num_tokens, candidates)
        if whole.first_token_s <= within_s / 2:
            return whole
        return outlook(self._navigator.num_uncached(flight, _now()), candidates)

    def _show(self) -> None:
        self._metrics.queued_requests.set(self._admission.num_waiting)


def _now() -> float:
    return asyncio.get_running_loop().time()

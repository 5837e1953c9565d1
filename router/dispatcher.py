"""The open requests of one router: each is placed on a worker, tried again elsewhere, and ended once.

Belongs to the router's event loop; every method runs on it. About a request it speaks to its decode worker only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from cluster.config import RouterConfig
from cluster.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NobodyListens,
    NoWorker,
    Refused,
    RequestError,
    SessionError,
)
from cluster.log import Log
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from router.fleet import Fleet
from router.flight import Flight, RouterRequest, State
from router.navigator import Navigator
from router.plan import NoPlan, Plan
from router.siblings import Siblings
from router.trial import Trial, blamed


class Dispatcher:
    def __init__(
        self, config: RouterConfig, fleet: Fleet, navigator: Navigator, metrics: Metrics, log: Log, *, block_size: int
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._navigator = navigator
        self._metrics = metrics
        self._log = log
        self._block_size = block_size
        self._flights: dict[str, Flight] = {}
        self._placing: dict[str, Flight] = {}  # those that wait for a worker
        self._give_ups: dict[str, asyncio.TimerHandle] = {}
        self._deadlines: dict[str, float] = {}  # loop time
        self._alarms: dict[str, asyncio.TimerHandle] = {}
        self._siblings = Siblings()
        self._trial = Trial()
        self._gone: set[str] = set()  # members of which a dial said that they are lost

    def flight(self, request_id: str) -> Flight | None:
        return self._flights.get(request_id)

    def flights(self) -> Iterator[Flight]:
        return iter(list(self._flights.values()))

    def open(self, request: RouterRequest, deadline: float | None) -> Flight:
        """To be placed, and settled whatever comes. `deadline` is loop time. Raises InvalidRequest for an id in use."""
        if request.request_id in self._flights:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", "request_id")
        flight = Flight(request)
        self._flights[request.request_id] = flight
        if request.journal is not None:
            num_prompt, num_encoder = len(request.prompt_token_ids), len(request.encoder_token_ids)
            request.journal.opened(request.request_id, num_prompt, num_encoder)
        if deadline is not None:
            self._deadlines[request.request_id] = deadline
            self._alarms[request.request_id] = asyncio.get_running_loop().call_at(deadline, self._expire, flight)
        return flight

    # ------------------------------------------------------------ placing

    def _leader_plan(self, flight: Flight) -> Plan | None:
        """The plan of the flight that this one follows, if it runs where this one may go, too."""
        leader = self._flights.get(flight.request.leader_id)
        if leader is None or leader.state is not State.RUNNING or leader.plan is None:
            return None
        decode = leader.plan.decode.incarnation
        avoided = decode in flight.excluded or decode in flight.shunned
        taken = any(each.connected and each.incarnation == decode for each in self._fleet.candidates())
        return leader.plan if taken and not avoided else None

    def place(self, flight: Flight) -> None:
        """Submits the next attempt, or queues the flight until a worker appears.

        Broken is not dead: a flight under which two workers were lost waits until they are known to be gone, or until
        one of them is heard of again. If they are gone, it is refused, or tried alone; see router/trial.py.
        """
        if flight.is_suspected and not self._may_be_tried(flight):
            return
        led = self._leader_plan(flight)  # the leader's prefill computes the prompt for both
        plan = led or self._navigator.plan(flight, _now())
        if isinstance(plan, NoPlan):
            self._wait_for_worker(flight, plan)
            return
        session = self._fleet.session(plan.decode.incarnation)
        assert session is not None, "only connected workers are planned for decode"
        self._stop_waiting(flight)
        key = flight.place(plan, session.id)
        root = self._navigator.root(plan.decode, flight)
        sibling = ""
        if self._navigator.uses_blocks:
            hashes = flight.hashes(root, self._block_size)
            sibling = self._siblings.join(flight, plan.decode.incarnation, hashes)
        submit = flight.submit(root, self._block_size, self._remaining_ms(flight), sibling=sibling)
        if flight.request.journal is not None:
            leader = flight.request.leader_id if led is not None else ""
            num_emitted = len(flight.emitted)
            flight.request.journal.sent(
                key.attempt, plan, is_replay=flight.is_replay, num_emitted=num_emitted, leader=leader
            )
        session.send(pb.Frame(submit=submit), key)
        self._navigator.placed(flight, plan, _now(), led=led is not None)
        if flight.is_replay:
            self._metrics.replays.inc()
        self._log.debug(
            "submitted",
            request=key.request_id,
            attempt=key.attempt,
            worker=plan.decode.name,
            peer=plan.prefill.name,
            num_prompt_tokens=len(flight.request.prompt_token_ids),
            num_tokens=len(flight.emitted),
        )

    def _may_be_tried(self, flight: Flight) -> bool:
        """Whether a flight that is suspected may run. If not, it is queued, or has ended."""
        if flight.on_trial and not flight.is_convicted:
            return True
        if not all(self._is_gone(incarnation) for incarnation in flight.suspects):
            self._queue(flight)
        elif flight.is_convicted or not flight.in_company:
            self.end(flight, flight.poisonous())
        elif self._trial.take(flight):
            return True
        else:
            self._queue(flight)
        return False

    def _wait_for_worker(self, flight: Flight, unplaced: NoPlan) -> None:
        failure = flight.last_failure
        if unplaced.exhausted and failure is not None and failure.code != pb.DRAINING:  # its successor will come
            self.end(flight, flight.last_error(unplaced))
        else:
            self._queue(flight)

    def _queue(self, flight: Flight) -> None:
        request_id = flight.request.request_id
        if request_id not in self._placing:
            self._placing[request_id] = flight
            loop = asyncio.get_running_loop()
            self._give_ups[request_id] = loop.call_later(self._config.worker_wait_s, self._give_up, flight)

    def _stop_waiting(self, flight: Flight) -> None:
        self._placing.pop(flight.request.request_id, None)
        timer = self._give_ups.pop(flight.request.request_id, None)
        if timer is not None:
            timer.cancel()

    def place_waiting(self) -> None:
        """Something changed: those who wait try again, larger priority first, then in order of arrival."""
        for flight in sorted(self._placing.values(), key=lambda flight: -flight.request.priority):
            self.place(flight)

    def heard_of(self, incarnation: str) -> None:
        """A worker lives: what was lost on it did not kill it."""
        self._gone.discard(incarnation)
        for flight in self._flights.values():
            flight.heard_of(incarnation)

    def unreachable(self, incarnation: str, error: SessionError) -> None:
        """A dial failed. Nobody listens, or another one does, or it hangs: whoever it was, it is lost."""
        if isinstance(error, Refused | NobodyListens):
            self._gone.add(incarnation)
            self.place_waiting()

    def left(self, incarnation: str) -> None:
        """No member any more."""
        self._gone.discard(incarnation)

    def _is_gone(self, incarnation: str) -> bool:
        return incarnation in self._gone or self._fleet.member(incarnation) is None

    def _give_up(self, flight: Flight) -> None:
        if flight.is_suspected and flight.in_company and self._trial.is_on:  # its turn will come
            self._stop_waiting(flight)
            self._queue(flight)
            return
        if flight.is_suspected:
            self.end(flight, flight.poisonous())
            return
        plan = self._navigator.plan(flight, _now())
        reason = plan.reason if isinstance(plan, NoPlan) else "a worker came too late"
        last = f"; the last attempt: {flight.last_failure.message}" if flight.last_failure else ""
        self.end(flight, NoWorker(f"{reason} (waited {self._config.worker_wait_s:g} s{last}); retry later"))

    def _expire(self, flight: Flight) -> None:
        after = f"{flight.request.deadline_s:g} s, {len(flight.emitted)} tokens were generated"
        self.end(flight, DeadlineExceeded(f"the deadline passed after {after}; ask for fewer tokens or more time"))

    def _remaining_ms(self, flight: Flight) -> int:
        """0: none. Never 0 for a deadline that has all but passed."""
        until = self._deadlines.get(flight.request.request_id)
        return 0 if until is None else max(1, int(1000 * (until - _now())))

    # ------------------------------------------------------------ ending

    def end(self, flight: Flight, error: RequestError) -> None:
        self.cancel(flight, str(error))
        flight.end(error)
        self._stop_waiting(flight)

    def settle(self, flight: Flight, reason: str) -> None:
        """The one way out of a request: the worker stops, every table forgets."""
        self.cancel(flight, reason)
        self._stop_waiting(flight)
        self._navigator.ended(flight)
        if flight.request.journal is not None:
            flight.request.journal.ended(flight.finish, flight.error)
        self._siblings.left(flight)
        self._flights.pop(flight.request.request_id, None)
        self._deadlines.pop(flight.request.request_id, None)
        alarm = self._alarms.pop(flight.request.request_id, None)
        if alarm is not None:
            alarm.cancel()
        if self._trial.leave(flight):
            self.place_waiting()

    def cancel(self, flight: Flight, reason: str) -> None:
        """Tells the decode worker to stop, if it may still be working on it."""
        if flight.state is not State.RUNNING or flight.plan is None:
            return
        session = self._fleet.session(flight.plan.decode.incarnation)
        if session is not None and session.id == flight.session_id:
            session.send(pb.Frame(cancel=pb.Cancel(key=flight.key.wire(), reason=reason)), flight.key)
        flight.session_id = ""  # what still arrives of it is old

    def lost(self, session_id: str, message: str) -> None:
        """A session broke, and all that ran over it."""
        lost = [each for each in self.flights() if each.state is State.RUNNING and each.session_id == session_id]
        suspects = blamed(lost)
        failure = pb.Failure(code=pb.PEER_LOST, message=message)
        for flight in lost:
            self.attempt_failed(flight, failure, blamed=flight in suspects, in_company=len(suspects) > 1)

    def attempt_failed(
        self,
        flight: Flight,
        failure: pb.Failure,
        *,
        reported: bool = False,
        blamed: bool = True,
        in_company: bool = False,
    ) -> None:
        code = pb.ErrorCode.Name(failure.code).lower()
        assert flight.plan is not None
        self._metrics.failures.labels(code).inc()
        if flight.request.journal is not None:
            flight.request.journal.failed(failure)
        self._log.warning(
            "attempt failed",
            request=flight.request.request_id,
            attempt=flight.attempt,
            worker=flight.plan.decode.name,
            incarnation=flight.plan.decode.incarnation,
            code=code,
            reason=failure.message,
            num_tokens=len(flight.emitted),
        )
        limit = self._config.max_attempts
        if flight.fail_attempt(failure, limit, reported=reported, blamed=blamed, in_company=in_company):
            self.place(flight)

    def retry_elsewhere(self, flight: Flight, code: pb.ErrorCode, message: str) -> None:
        """An attempt that this router ends: its worker lives and must be told."""
        self.cancel(flight, message)
        self.attempt_failed(flight, pb.Failure(code=code, message=message))


def _now() -> float:
    return asyncio.get_running_loop().time()

"""One ingress replica's router: sessions to the workers, a plan for each request, and its tokens, each once.

Everything here belongs to the thread of the event loop that `start` was awaited on; `generate` runs on that loop.
What the words thread hears is posted there, one call per frame. `update_membership` may be called from any thread.

A request whose decode worker is lost goes on elsewhere: the next attempt submits (prompt, emitted). A failed
prefill is the decode worker's business: its plan names a spare. Control follows the tree, so the router speaks
about a request to its decode worker only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from google.protobuf.message import DecodeError

from cluster.config import LimitsConfig, Role, RouterConfig
from cluster.errors import Busy, DeadlineExceeded, InvalidRequest, NoWorker, RequestError, SessionError
from cluster.log import Log
from cluster.membership import Membership
from cluster.metrics import DropReason, Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.rpc import Dialer
from cluster.session import Session
from cluster.words_thread import WordsThread
from router.admin import Admin
from router.admission import Admission
from router.block_feed import TOPIC
from router.fleet import Fleet
from router.flight import Flight, Receipt, RouterRequest, State, TokenDelta
from router.navigator import Navigator
from router.plan import NoPlan, Plan
from router.route_book import RouteTold


class Router:
    """Implements `cluster.session.SessionHandler`. Does not own the words thread."""

    def __init__(
        self,
        config: RouterConfig,
        limits: LimitsConfig,
        words: WordsThread,
        identity: pb.Identity,
        secret: bytes,
        metrics: Metrics,
        log: Log,
        *,
        block_size: int,
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._log = log
        self._block_size = block_size
        self._fleet = Fleet()
        self._navigator = Navigator(config, self._fleet, metrics, log, self._post, block_size=block_size)
        self._admission = Admission(limits.max_requests)
        self._admin = Admin(self._fleet)
        self._flights: dict[str, Flight] = {}
        self._placing: dict[str, Flight] = {}  # those that wait for a worker
        self._give_ups: dict[str, asyncio.TimerHandle] = {}
        self._deadlines: dict[str, float] = {}  # loop time
        self._was_warm = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._latest = Membership()
        self._dialer = Dialer(words, identity, secret, self, on_failed=self._unreachable)

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Binds the router to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._members(self._latest)

    async def stop(self) -> None:
        """Ends what is open with NoWorker, then all sessions, which ends it on the workers."""
        for flight in list(self._flights.values()):
            self._end(flight, NoWorker("this ingress replica stops; retry"))
        await asyncio.to_thread(self._dialer.stop)

    def update_membership(self, membership: Membership) -> None:
        """Dials who joined, drops who left. Any thread; the last call counts."""
        self._latest = membership
        self._post(self._members, membership)

    def set_replicas(self, num_replicas: int) -> None:
        """How many ingress replicas are alive: they share `limits.max_requests`. Any thread."""
        self._post(self._admission.set_replicas, num_replicas)

    # ------------------------------------------------------------ what the ingress asks

    def ready(self) -> bool:
        """Whether a request would run now, and as configured: through a warm source unless prefill is local.

        A fleet that was warm once and fell back to local prefill is still ready.
        """
        plan = self._navigator.any_plan()
        if isinstance(plan, NoPlan):
            return False
        fell_back = plan.prefill.incarnation == plan.decode.incarnation and self._config.local_prefill == "fallback"
        if fell_back and self._fleet.expects(Role.PREFILL) and not self._was_warm:
            alone = all(c.incarnation == plan.decode.incarnation for c in self._fleet.candidates())
            return alone and Role.PREFILL in plan.decode.roles
        self._was_warm = True
        return True

    def why_not_ready(self) -> str:
        """For people, when `ready` is false."""
        plan = self._navigator.any_plan()
        return plan.reason if isinstance(plan, NoPlan) else "no prefill worker is warm yet"

    @property
    def num_open(self) -> int:
        return self._admission.num_open

    def route(self, request_id: str) -> RouteTold | None:
        """How one of the last requests here was routed. Any thread."""
        return self._navigator.routes.tell(request_id)

    async def load(self) -> dict[str, pb.AdminResponse]:
        """Load and counters of every connected worker, asked now, by incarnation."""
        return await self._admin.ask(pb.AdminRequest(load=True))

    async def clear_cache(self) -> dict[str, pb.AdminResponse]:
        """Drops the cached blocks of every connected worker; their loads afterwards, by incarnation."""
        return await self._admin.ask(pb.AdminRequest(clear_cache=True))

    async def generate(self, request: RouterRequest) -> AsyncGenerator[TokenDelta]:
        """The tokens of one request, in order, each index once; the last delta has `finish`.

        Raises the RequestError family. Closing the iterator early, or cancelling the task, cancels the request.
        """
        loop = asyncio.get_running_loop()
        assert loop is self._loop, "await start() on the loop that generates"
        if request.request_id in self._flights:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", "request_id")
        with self._admission.enter(loop.time()) as stay:
            flight = Flight(request)
            self._flights[request.request_id] = flight
            alarm = None
            if request.deadline_s is not None:
                self._deadlines[request.request_id] = loop.time() + request.deadline_s
                alarm = loop.call_later(max(0.0, request.deadline_s), self._expire, flight)
            try:
                self._place(flight)
                while (delta := flight.take()) is None or delta.finish is None:
                    if delta is not None:
                        yield delta
                    elif flight.error is not None:
                        raise flight.error
                    else:
                        await flight.news()
            finally:
                if alarm is not None:
                    alarm.cancel()
                self._settle(flight, "the client has what it wants or is gone")
                stay.until = loop.time()
        yield delta  # everything is settled: a client that stops reading here holds nothing

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

    def _place(self, flight: Flight) -> None:
        """Submits the next attempt, or queues the flight until a worker appears."""
        led = self._leader_plan(flight)  # the leader's prefill computes the prompt for both
        plan = led or self._navigator.plan(flight, self._now())
        if isinstance(plan, NoPlan):
            self._wait_for_worker(flight, plan)
            return
        session = self._fleet.session(plan.decode.incarnation)
        assert session is not None, "only connected workers are planned for decode"
        self._stop_waiting(flight)
        key = flight.place(plan, session.id)
        submit = flight.submit(self._navigator.root(plan.decode), self._block_size, self._remaining_ms(flight))
        session.send(pb.Frame(submit=submit), key)
        self._navigator.placed(flight, plan, self._now(), led=led is not None)
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

    def _wait_for_worker(self, flight: Flight, unplaced: NoPlan) -> None:
        request_id = flight.request.request_id
        failure = flight.last_failure
        if unplaced.exhausted and failure is not None and failure.code != pb.DRAINING:  # its successor will come
            self._end(flight, flight.last_error(unplaced))
        elif request_id not in self._placing:
            assert self._loop is not None
            self._placing[request_id] = flight
            self._give_ups[request_id] = self._loop.call_later(self._config.worker_wait_s, self._give_up, flight)

    def _stop_waiting(self, flight: Flight) -> None:
        self._placing.pop(flight.request.request_id, None)
        timer = self._give_ups.pop(flight.request.request_id, None)
        if timer is not None:
            timer.cancel()

    def _place_waiting(self) -> None:
        """Something changed: those who wait try again, larger priority first, then in order of arrival."""
        for flight in sorted(self._placing.values(), key=lambda flight: -flight.request.priority):
            self._place(flight)

    def _give_up(self, flight: Flight) -> None:
        plan = self._navigator.plan(flight, self._now())
        reason = plan.reason if isinstance(plan, NoPlan) else "a worker came too late"
        last = f"; the last attempt: {flight.last_failure.message}" if flight.last_failure else ""
        self._end(flight, NoWorker(f"{reason} (waited {self._config.worker_wait_s:g} s{last}); retry later"))

    def _expire(self, flight: Flight) -> None:
        after = f"{flight.request.deadline_s:g} s, {len(flight.emitted)} tokens were generated"
        self._end(flight, DeadlineExceeded(f"the deadline passed after {after}; ask for fewer tokens or more time"))

    def _remaining_ms(self, flight: Flight) -> int:
        """0: none. Never 0 for a deadline that has all but passed."""
        until = self._deadlines.get(flight.request.request_id)
        assert self._loop is not None
        return 0 if until is None else max(1, int(1000 * (until - self._loop.time())))

    # ------------------------------------------------------------ ending

    def _end(self, flight: Flight, error: RequestError) -> None:
        self._cancel(flight, str(error))
        flight.end(error)
        self._stop_waiting(flight)

    def _settle(self, flight: Flight, reason: str) -> None:
        """The one way out of a request: the worker stops, every table forgets."""
        self._cancel(flight, reason)
        self._stop_waiting(flight)
        self._navigator.ended(flight)
        self._flights.pop(flight.request.request_id, None)
        self._deadlines.pop(flight.request.request_id, None)

    def _cancel(self, flight: Flight, reason: str) -> None:
        """Tells the decode worker to stop, if it may still be working on it."""
        if flight.state is not State.RUNNING or flight.plan is None:
            return
        session = self._fleet.session(flight.plan.decode.incarnation)
        if session is not None and session.id == flight.session_id:
            session.send(pb.Frame(cancel=pb.Cancel(key=flight.key.wire(), reason=reason)), flight.key)
        flight.session_id = ""  # what still arrives of it is old

    def _attempt_failed(self, flight: Flight, failure: pb.Failure, *, reported: bool = False) -> None:
        code = pb.ErrorCode.Name(failure.code).lower()
        assert flight.plan is not None
        self._metrics.failures.labels(code).inc()
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
        if flight.fail_attempt(failure, self._config.max_attempts, reported=reported):
            self._place(flight)

    # ------------------------------------------------------------ what the words thread hears

    def on_open(self, session: Session) -> None:
        self._post(self._opened, session)

    def on_frame(self, session: Session, frame: pb.Frame) -> None:
        self._post(self._heard, session, frame)

    def on_bulk(self, session: Session, topic: str, payload: bytes) -> None:
        self._post(self._heard_bulk, session, topic, payload)

    def on_broken(self, session: Session, error: SessionError) -> None:
        self._post(self._broken, session, error)

    def on_overflow(self, session: Session, key: RequestKey) -> None:
        self._post(self._overflowed, session, key)

    def _unreachable(self, incarnation: str, error: SessionError) -> None:
        self._log.warning("a worker cannot be reached", incarnation=incarnation, reason=str(error))

    def _post(self, call: Callable[..., None], *args: object) -> None:
        """Before `start` and after the loop's end there is nobody to tell."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(call, *args)

    def _now(self) -> float:
        assert self._loop is not None
        return self._loop.time()

    # ------------------------------------------------------------ on the loop

    def _members(self, membership: Membership) -> None:
        dial, left = self._fleet.update(membership)
        for member in dial:
            self._dialer.keep(member.address, member.incarnation)
        for incarnation in left:
            self._dialer.drop(incarnation)
            self._navigator.feed.gone(incarnation)
        self._place_waiting()

    def _opened(self, session: Session) -> None:
        if self._fleet.opened(session):
            member = self._fleet.member(session.peer.incarnation)
            if member is not None and self._navigator.uses_blocks:
                self._navigator.feed.opened(session, member, self._now())
            self._metrics.sessions.labels("worker").set(len(self._fleet.sessions()))
            self._place_waiting()

    def _broken(self, session: Session, error: SessionError) -> None:
        self._fleet.broken(session)
        self._admin.broken(session)
        self._navigator.feed.broken(session)
        self._metrics.sessions.labels("worker").set(len(self._fleet.sessions()))
        self._metrics.broken_sessions.labels(error.reason).inc()
        message = f"the session to {session.peer.name} broke: {error}"
        lost = [f for f in self._flights.values() if f.state is State.RUNNING and f.session_id == session.id]
        for flight in lost:
            self._attempt_failed(flight, pb.Failure(code=pb.PEER_LOST, message=message))

    def _overflowed(self, session: Session, key: RequestKey) -> None:
        """The worker does not read: what was submitted is lost on the way."""
        flight = self._flights.get(key.request_id)
        if flight is not None and flight.state is State.RUNNING and flight.key == key:
            self._metrics.overflows.inc()
            self._retry_elsewhere(flight, pb.BUSY, f"{session.peer.name} reads too slowly")

    def _heard(self, session: Session, frame: pb.Frame) -> None:
        kind = frame.WhichOneof("kind")
        if kind == "step_tokens":
            for tokens in frame.step_tokens.sequences:
                self._received(session, tokens)
        elif kind == "load_report":
            self._fleet.reported(session, frame.load_report)
            self._navigator.feed.reported(session, frame.load_report, self._now())
            self._place_waiting()
        elif kind == "admin_response":
            self._fleet.reported(session, frame.admin_response.load)  # newer than the last report
            self._admin.answered(session, frame.admin_response)
        elif kind == "goodbye":
            self._fleet.leaving(session)
        else:
            self._drop(DropReason.UNSUPPORTED)

    def _heard_bulk(self, session: Session, topic: str, payload: bytes) -> None:
        """A peer's mistake ends its session."""
        if topic != TOPIC:
            session.close(f"nothing listens to bulk topic {topic!r} ({len(payload)} bytes)")
            return
        try:
            self._navigator.feed.heard(session, pb.BlockEvents.FromString(payload), self._now())
        except (DecodeError, ValueError) as error:
            session.close(f"bad block events: {error}")

    def _received(self, session: Session, tokens: pb.SequenceTokens) -> None:
        flight = self._flights.get(tokens.key.request_id)
        if flight is None:
            self._drop(DropReason.UNKNOWN_REQUEST)
            return
        match flight.receive(session.id, tokens):
            case Receipt.OLD_ATTEMPT:
                self._drop(DropReason.OLD_ATTEMPT)
            case Receipt.REPEATED:
                self._drop(DropReason.REPEATED_INDEX)
            case Receipt.FAILED:
                self._attempt_failed(flight, tokens.failure, reported=True)
            case Receipt.GAP:
                sent = f"{len(tokens.token_ids)} tokens from {tokens.first_token_index} on"
                gap = f"{session.peer.name} left something out: it sent {sent} when {len(flight.emitted)} were known"
                self._retry_elsewhere(flight, pb.INTERNAL, gap)
            case Receipt.UNREAD:
                self._end(flight, Busy("the client does not read its tokens"))
            case Receipt.TAKEN:
                pass

    def _retry_elsewhere(self, flight: Flight, code: pb.ErrorCode, message: str) -> None:
        """An attempt that this router ends: its worker lives and must be told."""
        self._cancel(flight, message)
        self._attempt_failed(flight, pb.Failure(code=code, message=message))

    def _drop(self, reason: DropReason) -> None:
        self._metrics.dropped_frames.labels(reason).inc()

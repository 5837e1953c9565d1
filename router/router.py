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
from cluster.errors import Busy, NoWorker, SessionError
from cluster.hidden_states import HiddenStates, heard_states
from cluster.log import Log
from cluster.membership import Membership
from cluster.metrics import DropReason, Metrics
from cluster.parts import BLOCKS_TOPIC
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.rpc import Dialer
from cluster.session import Session
from cluster.words_thread import WordsThread
from router.admin import Admin
from router.admission import Place
from router.dispatcher import Dispatcher
from router.encode import is_read_apart
from router.entrance import Entrance
from router.fleet import Fleet
from router.flight import Receipt, RouterRequest, State, TokenDelta
from router.navigator import Navigator
from router.plan import NoPlan, Plan
from router.route_book import RouteSummary, RouteTold
from router.status import FleetTold


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
        self._fleet = Fleet()
        self._navigator = Navigator(config, self._fleet, metrics, log, self._post, block_size=block_size)
        self._admin = Admin(self._fleet)
        self._dispatcher = Dispatcher(config, self._fleet, self._navigator, metrics, log, block_size=block_size)
        self._entrance = Entrance(limits, self._fleet, self._navigator, self._dispatcher, metrics)
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
        for flight in self._dispatcher.flights():
            self._dispatcher.end(flight, NoWorker("this ingress replica stops; retry"))
        await asyncio.to_thread(self._dialer.stop)

    def update_membership(self, membership: Membership) -> None:
        """Dials who joined, drops who left. Any thread; the last call counts."""
        self._latest = membership
        self._post(self._members, membership)

    def set_replicas(self, num_replicas: int) -> None:
        """How many ingress replicas are alive: they share `limits`. Any thread."""
        self._post(self._entrance.set_replicas, num_replicas)

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
        if not self._was_warm and self._lacks_encoder(plan):
            return False
        self._was_warm = True
        return True

    def why_not_ready(self) -> str:
        """For people, when `ready` is false."""
        plan = self._navigator.any_plan()
        if isinstance(plan, NoPlan):
            return plan.reason
        return f"no {'encode' if self._lacks_encoder(plan) else 'prefill'} worker is warm yet"

    def _lacks_encoder(self, plan: Plan) -> bool:
        return self._fleet.expects(Role.ENCODE) and not is_read_apart(plan, self._fleet.candidates())

    @property
    def num_open(self) -> int:
        return self._entrance.num_open

    @property
    def is_full(self) -> bool:
        """Whether the next request would be refused because of those that run and wait."""
        return self._entrance.is_full

    def route(self, request_id: str) -> RouteTold | None:
        """How one of the last requests here was routed. Any thread."""
        return self._navigator.routes.tell(request_id)

    def last_routes(self, count: int) -> tuple[RouteSummary, ...]:
        """Of requests here, the youngest first. Any thread."""
        return self._navigator.routes.last(count)

    def fleet(self, max_pairs: int) -> FleetTold:
        """All members and what each said of itself last; so many of their pairs. On the loop."""
        return self._fleet.told(max_pairs)

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
        deadline = None if request.deadline_s is None else loop.time() + max(0.0, request.deadline_s)
        flight = self._dispatcher.open(request, deadline)
        place: Place | None = None
        try:
            place = visit = self._entrance.enter(flight)
            while (delta := flight.take()) is None or delta.finish is None:
                if delta is not None:
                    self._entrance.generated(visit, len(delta.token_ids))
                    yield delta
                elif flight.error is not None:
                    raise flight.error
                else:
                    await flight.news()
        finally:
            self._dispatcher.settle(flight, "the client has what it wants or is gone")
            if place is not None:
                self._entrance.leave(place)
        yield delta  # everything is settled: a client that stops reading here holds nothing

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
        self._post(self._dispatcher.unreachable, incarnation, error)

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
            self._dispatcher.left(incarnation)
        self._dispatcher.place_waiting()

    def _opened(self, session: Session) -> None:
        if self._fleet.opened(session):
            member = self._fleet.member(session.peer.incarnation)
            if member is not None and self._navigator.uses_blocks:
                self._navigator.feed.opened(session, member, self._now())
            self._metrics.sessions.labels("worker").set(len(self._fleet.sessions()))
            self._dispatcher.heard_of(session.peer.incarnation)
            self._dispatcher.place_waiting()

    def _broken(self, session: Session, error: SessionError) -> None:
        self._fleet.broken(session)
        self._admin.broken(session)
        self._navigator.feed.broken(session)
        self._metrics.sessions.labels("worker").set(len(self._fleet.sessions()))
        self._metrics.broken_sessions.labels(error.reason).inc()
        self._dispatcher.lost(session.id, f"the session to {session.peer.name} broke: {error}")

    def _overflowed(self, session: Session, key: RequestKey) -> None:
        """The worker does not read: what was submitted is lost on the way."""
        flight = self._dispatcher.flight(key.request_id)
        if flight is not None and flight.state is State.RUNNING and flight.key == key:
            self._metrics.overflows.inc()
            self._dispatcher.retry_elsewhere(flight, pb.BUSY, f"{session.peer.name} reads too slowly")

    def _heard(self, session: Session, frame: pb.Frame) -> None:
        kind = frame.WhichOneof("kind")
        if kind == "step_tokens":
            for tokens in frame.step_tokens.sequences:
                self._received(session, tokens, frame.step_tokens)
        elif kind == "load_report":
            self._fleet.reported(session, frame.load_report)
            self._navigator.feed.reported(session, frame.load_report, self._now())
            self._dispatcher.place_waiting()
        elif kind == "admin_response":
            self._fleet.reported(session, frame.admin_response.load)  # newer than the last report
            self._admin.answered(session, frame.admin_response)
        elif kind == "goodbye":
            self._fleet.leaving(session)
        else:
            self._drop(DropReason.UNSUPPORTED)

    def _heard_bulk(self, session: Session, topic: str, payload: bytes) -> None:
        """A peer's mistake ends its session."""
        if topic != BLOCKS_TOPIC:
            if (heard := heard_states(session, topic, payload)) is not None:
                self._brought(session, *heard)
            return
        try:
            self._navigator.feed.heard(session, pb.BlockEvents.FromString(payload), self._now())
        except (DecodeError, ValueError) as error:
            session.close(f"bad block events: {error}")

    def _brought(self, session: Session, key: RequestKey, states: HiddenStates) -> None:
        flight = self._dispatcher.flight(key.request_id)
        if flight is None:
            self._drop(DropReason.UNKNOWN_REQUEST)
        elif not flight.bring(session.id, key.attempt, states):
            self._drop(DropReason.OLD_ATTEMPT)

    def _received(self, session: Session, tokens: pb.SequenceTokens, step: pb.StepTokens) -> None:
        flight = self._dispatcher.flight(tokens.key.request_id)
        if flight is None:
            self._drop(DropReason.UNKNOWN_REQUEST)
            return
        match flight.receive(session.id, tokens):
            case Receipt.OLD_ATTEMPT:
                self._drop(DropReason.OLD_ATTEMPT)
            case Receipt.REPEATED:
                self._drop(DropReason.REPEATED_INDEX)
            case Receipt.FAILED:
                num_failed = sum(each.failure.code == tokens.failure.code for each in step.sequences)
                self._dispatcher.attempt_failed(flight, tokens.failure, reported=True, in_company=num_failed > 1)
            case Receipt.GAP:
                sent = f"{len(tokens.token_ids)} tokens from {tokens.first_token_index} on"
                gap = f"{session.peer.name} left something out: it sent {sent} when {len(flight.emitted)} were known"
                self._dispatcher.retry_elsewhere(flight, pb.INTERNAL, gap)
            case Receipt.UNREAD:
                self._dispatcher.end(flight, Busy("the client does not read its tokens"))
            case Receipt.TAKEN:
                pass

    def _drop(self, reason: DropReason) -> None:
        self._metrics.dropped_frames.labels(reason).inc()

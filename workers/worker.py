"""One worker: its words on the words thread, its engine loop on the engine thread, joined by one inbox.

    words thread   on_frame, on_open, on_broken ──┐
    bytes threads  Done, Connected ───────────────┤ inbox ──▶ engine thread: drain, tick, flush, step, settle, flush
    anyone         members, drain ────────────────┘                        └──▶ session outboxes (never awaited)

The engine thread alone owns scheduler, block manager, ledger and stages.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue

from cluster.autoscaler import WorkerLoad
from cluster.config import Role
from cluster.errors import SessionError
from cluster.exporter import Exporter
from cluster.heart import StepAge
from cluster.hidden_states import heard_states
from cluster.log import Log
from cluster.membership import Member, Membership, diff
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.rpc import Dialer, WordsServer, WordsThread
from cluster.session import Session
from kvtransfer.connector import Connected, Done
from workers.assembly import WorkerSettings, assemble
from workers.block_subscribers import BlockSubscribers
from workers.borrower import Borrower
from workers.decode import DecodeStage
from workers.duty import Duty, takes_prompts
from workers.encode import EncodeStage
from workers.encode_fetch import OutputFetches
from workers.engine.step_plan import StepOutcome
from workers.grammar_queue import GrammarQueue
from workers.lender import Lender
from workers.pairs import Pairs, offered_to, worth_reading
from workers.prefill import PrefillStage
from workers.reads import Reads
from workers.report import LastReport, counters, load_report
from workers.workload import Workload

TICK_S = 0.01  # deadlines, retries and waits are looked at this often
IDLE_TICK_S = 0.05  # with nothing open
LAST_FRAMES_S = 0.5  # after a drain whose time was up, for what is handed over

_STAGES = {Role.ENCODE: pb.ENCODE, Role.PREFILL: pb.PREFILL, Role.DECODE: pb.DECODE}


class Worker:
    """One shard on one rank. `start` loads the model and listens; the object implements SessionHandler."""

    def __init__(self, settings: WorkerSettings, log: Log, on_crash: Callable[[BaseException], None]) -> None:
        """`on_crash` is called on the engine thread when its loop dies of a bug: end the process there."""
        self._settings = settings
        self._log = log.bind(worker=settings.name, pool=settings.pool)
        self._on_crash = on_crash
        self.metrics = Metrics()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._membership = Membership()
        self._sessions: set[Session] = set()
        self._workload = Workload(self.metrics, settings.scheduler.max_sequences, time.monotonic())
        self._last_report = LastReport()
        self._engine_thread = threading.Thread(target=self._run, name="sluice-engine", daemon=True)
        self._stopping = threading.Event()
        self._drained = threading.Event()
        self._duty = Duty(settings.incarnation, settings.roles, settings.scheduler.handover_s)
        self._turned_at = time.monotonic()
        self._ticked_at = 0.0
        self._idle = True

    # ------------------------------------------------------------------ life

    def start(self) -> Member:
        """Loads, listens, starts the threads. Blocks; raises CheckpointError, ConfigError."""
        settings = self._settings
        parts = self._parts = assemble(settings, self._done)
        self._words = WordsThread(self.step_age, settings.words).start()
        identity = pb.Identity(
            kind=pb.WORKER,
            name=settings.name,
            incarnation=settings.incarnation,
            compatibility_hash=parts.compatibility_hash,
            roles=[_STAGES[role] for role in settings.roles],
            ranks=[pb.RankInfo(rank=0, shard=0, tp_rank=0, tp_size=1)],
        )
        me = pb.WorkerRef(name=settings.name, incarnation=settings.incarnation)
        self._subscribers = BlockSubscribers(parts.blocks)
        self._pairs = Pairs(parts.executors, self._connected, self.metrics, self._log)
        self._reads = Reads(parts, self._pairs, self.metrics)
        self._lender = Lender(parts, self.metrics, settings.name)
        borrower = self._borrower = Borrower(parts, self._pairs, self._reads, self.metrics, settings.incarnation)
        limits = settings.scheduler
        outputs = self._outputs = OutputFetches(parts, self._pairs, self._reads, self.metrics, limits, me)
        self._encode = EncodeStage(parts, self.metrics, limits, settings.name)
        self._prefill = PrefillStage(parts, borrower, outputs, self.metrics, limits, settings.name)
        self._decode = DecodeStage(parts, self._pairs, self._reads, borrower, outputs, self.metrics, limits, me)
        self._grammars = GrammarQueue(parts.constraints, self._post)
        self._dialer = Dialer(self._words, identity, settings.secret, self)
        self._server = WordsServer(self._words, identity, settings.secret, self)
        self._exporter = Exporter(self.metrics, settings.words)
        for executor in parts.executors:
            executor.start()
        self._engine_thread.start()
        address, metrics_address = self._server.start(), self._exporter.start()
        self._log.info("listening", address=address, num_blocks=parts.blocks.groups[0].num_blocks)
        return settings.member(address, metrics_address, parts.compatibility_hash, os.getpid())

    def update_members(self, membership: Membership) -> None:
        """Dials the sources that joined and drops those that left; follows what is said of this worker itself: its
        roles, and whether it leaves. Any thread."""
        self._post(partial(self._update_members, membership))

    def drain(self, timeout_s: float) -> bool:
        """Refuses new requests; returns whether the open ones, leases included, ended in time. What is then still
        open is handed over all the same. Blocks."""
        self._post(self._leave)
        if self._drained.wait(timeout_s):
            return True
        self._post(self._hand_over)
        self._drained.wait(LAST_FRAMES_S)
        return False

    def stop(self) -> None:
        """Ends sessions and threads. Peers see the sessions break; drain first. Idempotent."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._post(lambda: None)
        if self._engine_thread.ident is not None:
            self._engine_thread.join()
        self._grammars.stop()
        self._words.stop()
        self._exporter.stop()
        for executor in self._parts.executors:
            executor.stop()

    def load(self) -> WorkerLoad:
        """What it had to do since the last call. Any thread; raises TimeoutError when the loop hangs."""
        answer: Future[WorkerLoad] = Future()

        def tell() -> None:
            answer.set_result(self._workload.tell(self._load(), self._duty.roles, time.monotonic()))

        self._post(tell)
        return answer.result(self._settings.words.step_timeout_s)

    def healthy(self) -> bool:
        """Whether the engine's loop turns and bytes can move."""
        alive = self._engine_thread.is_alive() and not self._stopping.is_set()
        alive = alive and all(executor.failure is None for executor in self._parts.executors)
        return alive and not self.step_age().stuck(self._settings.words.step_timeout_s)

    def step_age(self) -> StepAge:
        """Any thread. An idle loop turns too, so only a hung one ages."""
        return StepAge(time.monotonic() - self._turned_at, self._engine_thread.is_alive())

    # ------------------------------------------------------------------ words thread

    def on_open(self, session: Session) -> None:
        self._post(partial(self._opened, session))

    def on_frame(self, session: Session, frame: pb.Frame) -> None:
        self._post(partial(self._frame, session, frame))

    def on_bulk(self, session: Session, topic: str, payload: bytes) -> None:
        if (heard := heard_states(session, topic, payload)) is not None:
            self._post(lambda: self._outputs.states(session, *heard, time.monotonic()))

    def on_broken(self, session: Session, error: SessionError) -> None:
        self._post(partial(self._broken, session, error))

    def on_overflow(self, session: Session, key: RequestKey) -> None:
        self._post(partial(self._overflowed, key))

    # ------------------------------------------------------------------ bytes threads

    def _done(self, done: Done) -> None:
        self._post(partial(self._read, done))

    def _connected(self, session: Session, result: Connected) -> None:
        self._post(lambda: self._pairs.connected(session, result, time.monotonic()))

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.put(command)

    # ------------------------------------------------------------------ engine thread

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn()
        except BaseException as error:
            self._log.error("the engine loop died", exception=error)
            self._on_crash(error)
            raise

    def _turn(self) -> None:
        """One turn of the loop. Steps as long as there is work, otherwise waits for the inbox or the next tick."""
        engine = self._parts.engine
        self._drain_inbox((TICK_S if self._open_work() else IDLE_TICK_S) if self._idle else 0.0)
        now = self._turned_at = time.monotonic()
        if now - self._ticked_at >= TICK_S:
            self._tick(now)
        self._decode.flush(engine.num_steps, now)  # what was heard: first tokens of prompts computed elsewhere
        outcome = engine.step() if engine.has_work else None
        self._idle = outcome is None
        if outcome is not None:
            self._settle(outcome, now)
            self._decode.flush(engine.num_steps, now)

    def _read(self, done: Done) -> None:
        now = time.monotonic()
        result = self._reads.done(done, now)
        if result is not None and not (self._outputs.pulled(result, now) or self._borrower.pulled(result, now)):
            self._decode.pulled(result, now)

    def _settle(self, outcome: StepOutcome, started_at: float) -> None:
        now = time.monotonic()
        self._workload.stepped(self._parts.engine.last_batch, outcome, now - started_at)  # before anybody hears of it
        if outcome.error is not None:
            for sequence in outcome.failed:
                self._encode.fail(sequence, outcome.error)
                self._prefill.fail(sequence, outcome.error)
                self._decode.fail(sequence, outcome.error, now)
        self._encode.settle(outcome, started_at, now)
        self._prefill.settle(outcome, started_at, now)
        self._decode.settle(outcome, started_at, now)

    def _drain_inbox(self, wait_s: float) -> None:
        with suppress(Empty):
            command = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while True:
                command()
                command = self._inbox.get_nowait()

    def _tick(self, now: float) -> None:
        self._ticked_at = now
        for session in self._sessions:
            self._parts.source.renew(session.id, now)  # open: its heartbeats arrive
        self.metrics.expired_leases.inc(len(self._parts.source.tick(now).leases))
        self._pairs.tick(now)
        self._borrower.tick(now)
        self._outputs.tick(now)
        self._encode.tick(now)
        self._prefill.tick(now)
        self._decode.tick(now)
        self._subscribers.tick(now)
        if self._last_report.is_due(now) or self._pairs.changed:
            self._report(now)
        waiting, streams = self._duty.hands_over(now)
        if waiting:
            self._decode.hand_over(now, streams=streams)
        if self._duty.leaving and not self._open_work():
            self._drained.set()

    def _open_work(self) -> int:
        num_open = self._decode.num_open + self._prefill.num_open + self._encode.num_open + self._grammars.num_waiting
        return num_open + self._borrower.num_open + self._outputs.num_open + self._parts.ledger.num_leases

    def _report(self, now: float) -> None:
        self._pairs.changed = False
        if self._last_report.is_news(report := self._load(), now):
            for session in self._sessions:
                if session.peer.kind in (pb.INGRESS, pb.TOOL):
                    session.send(pb.Frame(load_report=report))

    def _load(self) -> pb.LoadReport:
        return load_report(
            self._parts,
            self._decode,
            self._encode,
            self._pairs,
            self.metrics,
            draining=self._duty.leaving,
            last_event_id=self._subscribers.last_id,
            prefill_tokens_per_s=self._workload.prefill_tokens_per_s,
        )

    def _leave(self) -> None:
        self._duty.leave(time.monotonic())
        self._take_duty()

    def _take_duty(self) -> None:
        self._encode.draining = self._prefill.draining = self._lender.draining = self._duty.leaving
        self._decode.draining = not self._duty.decodes
        self._last_report.forget()

    def _hand_over(self) -> None:
        self._decode.hand_over(time.monotonic(), streams=True)
        self._encode.hand_over()
        self._prefill.hand_over()

    def _update_members(self, membership: Membership) -> None:
        change = diff(self._membership, membership)
        self._membership = membership
        for member in change.left:
            self._dialer.drop(member.incarnation)
        self._pairs.closed = {m.incarnation for m in membership.members if not takes_prompts(m)}
        if self._duty.follow(membership, self._parts.compatibility_hash, time.monotonic()):
            self._take_duty()
            self._log.info("duty", role=",".join(sorted(self._duty.roles)), state="leaving" * self._duty.leaving)
        others = [m for m in membership.members if m.compatibility_hash == self._parts.compatibility_hash]
        num_peers = self._settings.transfer.fetch_peers
        for member in worth_reading(others, self._settings.incarnation, self._duty.roles, num_peers):
            self._dialer.keep(member.address, member.incarnation)

    def _opened(self, session: Session) -> None:
        self._sessions.add(session)
        self.metrics.sessions.labels(pb.PeerKind.Name(session.peer.kind).lower()).inc()
        if session.dialed:
            self._pairs.opened(session)
        self._last_report.forget()  # whoever joined learns the load at the next tick

    def _broken(self, session: Session, error: SessionError) -> None:
        self._sessions.discard(session)
        self._subscribers.leave(session)
        self.metrics.sessions.labels(pb.PeerKind.Name(session.peer.kind).lower()).dec()
        self.metrics.broken_sessions.labels(error.reason).inc()
        now = time.monotonic()
        self._pairs.broken(session)
        self._grammars.session_broken(session.id)
        self._encode.session_broken(session)
        self._prefill.session_broken(session, now)
        self._borrower.session_broken(session, now)
        self._outputs.session_broken(session, now)
        self._decode.session_broken(session, now)

    def _overflowed(self, key: RequestKey) -> None:
        self._encode.overflow(key)
        self._prefill.overflow(key)
        self._decode.overflow(key, time.monotonic())

    def _frame(self, session: Session, frame: pb.Frame) -> None:
        """A peer's mistake ends its session; nothing it sends ends the worker."""
        try:
            self._dispatch(session, frame, time.monotonic())
        except ValueError as error:
            session.close(f"bad {frame.WhichOneof('kind')} frame: {error}")

    def _dispatch(self, session: Session, frame: pb.Frame, now: float) -> None:
        again = partial(self._frame, session, frame)
        match frame.WhichOneof("kind"):
            case "submit":
                submit, key = frame.submit, RequestKey.of(frame.submit.key)
                if not self._grammars.holds(session.id, key, submit.sampling, again):
                    self._decode.submit(session, submit, now)
            case "cancel":
                key = RequestKey.of(frame.cancel.key)
                self._grammars.drop(session.id, key)
                self._decode.cancel(session, key, now)
                self._prefill.cancel(session, key)
                self._encode.cancel(session, key)
            case "kv_request":
                ask, key = frame.kv_request, RequestKey.of(frame.kv_request.key)
                if not self._grammars.holds(session.id, key, ask.sampling, again, ask=ask.ask):
                    self._prefill.request(session, ask, now)
            case "ticket":
                told = session, frame.ticket, now
                if not self._borrower.ticket(*told) and not self._outputs.ticket(*told):
                    self._decode.ticket(session, frame.ticket, now)
            case "held_request":
                self._lender.request(session, frame.held_request, now)
            case "encode_request":
                self._encode.request(session, frame.encode_request, now)
            case "release":
                self._grammars.drop(session.id, RequestKey.of(frame.release.key), frame.release.ask)
                self._encode.cancel(session, RequestKey.of(frame.release.key))
                self._prefill.release(session, frame.release)
            case "kv_failed":
                failed = session, frame.kv_failed, now
                if not self._borrower.kv_failed(*failed) and not self._outputs.kv_failed(*failed):
                    self._decode.kv_failed(session, frame.kv_failed, now)
            case "transport_query":
                late_s = self._settings.transfer.late_read_s
                offer = offered_to(frame.transport_query, self._parts.executors, self._settings.name, late_s)
                session.send(pb.Frame(transport_offer=offer))
            case "transport_offer":
                self._pairs.offered(session, frame.transport_offer)
            case "admin_request":
                session.send(pb.Frame(admin_response=self._administer(frame.admin_request)))
            case "block_query":
                self._subscribers.subscribe(session, frame.block_query, now)
            case "goodbye" | "unsupported" | "load_report" | "admin_response":
                pass
            case kind:
                raise ValueError(f"a worker takes no {kind}")

    def _administer(self, ask: pb.AdminRequest) -> pb.AdminResponse:
        if ask.clear_cache:
            self._parts.blocks.clear_cache()
        return pb.AdminResponse(id=ask.id, load=self._load(), counters=counters(self.metrics))

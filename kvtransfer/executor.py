"""The bytes of one rank: owns the transport, does what pulls say, reports each once, and a STUCK one once more.

    submit ─> raise own generations ─> READ data ─> READ the source's generations ─> compare ─> Done
                                          │              │
              error: LOST (once nothing is in flight)    ├ differs: STALE
              PENDING for longer than stuck_read_s: STUCK├ longer than T since the first read: LATE
                                    └ over at last: LOST │
                                                         └ else: OK

One thread drives it: its own (`start`), or a test that calls `run_once`. The other methods may be called from any
thread; callbacks come on the driving thread and must not block.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from cluster.errors import PeerLost, TransferError
from cluster.protos import worker_pb2 as pb
from kvtransfer.link import Landing, Link, ReadOrder, rank_offer, span_of
from kvtransfer.pool import KvPool
from kvtransfer.pull import BlockPair, Done, Outcome, Pull
from kvtransfer.transport import ReadId, ReadState, Transport
from kvtransfer.ways import Trial

log = logging.getLogger(__name__)

WARM_UP_BYTES = 32 << 20
WARM_UP_PAIRS = 64
POLL_S = 50e-6  # between polls of reads in flight, growing to the next until another one is posted
MAX_POLL_S = 1e-3
STUCK_POLL_S = 0.25  # reads given up may still complete; their handles are freed then


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """T, and when a read is given up, in seconds on the sink's monotonic clock."""

    late_read_s: float
    stuck_read_s: float


@dataclass(frozen=True, slots=True)
class Connected:
    """How one rank reaches a source. With `error` nothing can be read from it."""

    peer: str
    rank: int
    transport: str  # what moves the data: of several ways the fastest
    bytes_per_s: float = 0.0  # measured, best of several warm-up reads
    error: TransferError | None = None
    rates: Mapping[str, float] = field(default_factory=dict)  # bytes/s, by way; without those that failed


class _Reads:
    """Reads posted together. Over when none of them is in flight any more, whatever became of the others."""

    def __init__(self, transport: Transport, orders: Sequence[ReadOrder]) -> None:
        self.error: TransferError | None = None
        self._transport = transport
        self._pending: list[ReadId] = []
        for order in orders:
            try:
                read = transport.read(order.local, order.local_rows, order.remote, order.remote_rows)
            except TransferError as error:
                self.error = error
                break
            self._pending.append(read)

    def over(self) -> bool:
        pending: list[ReadId] = []
        for read in self._pending:
            try:
                if self._transport.poll(read) is ReadState.PENDING:
                    pending.append(read)
                    continue
            except TransferError as error:
                self.error = self.error or error
            self._transport.release(read)
        self._pending = pending
        return not pending


@dataclass(slots=True)
class _PullJob:
    pull: Pull
    link: Link
    transport: str
    num_bytes: int
    started: float
    reads: _Reads
    checking: bool = False  # data are here, generations are being read


@dataclass(slots=True)
class _WarmUp:
    link: Link
    callback: Callable[[Connected], None]
    pairs: list[BlockPair]
    trial: Trial
    started: float
    reads: _Reads


class Executor:
    """Owns `transport` and its agent; borrows `pool`, which must outlive `stop`."""

    def __init__(
        self,
        pool: KvPool,
        transport: Transport,
        limits: ReadLimits,
        on_done: Callable[[Done], None],
        *,
        shard: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._transport = transport
        self._limits = limits
        self._on_done = on_done
        self._shard = shard
        self._clock = clock
        self._rank = pool.layout.rank
        for group, table in enumerate(pool.generations):
            for storage in (*(storage for _, storage in pool.travelling(group)), table.entries):
                transport.register(span_of(storage))
        self._offer = rank_offer(pool, shard, transport.offer())
        self._landing = Landing(pool, transport)
        self._links: dict[str, Link] = {}
        self._closing: dict[str, Link] = {}  # disconnected, with reads in flight
        self._jobs: list[_PullJob | _WarmUp] = []
        self._stuck: list[_PullJob | _WarmUp] = []
        self._num_posted = 0  # reads
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None  # what ended the bytes thread: the worker is unhealthy then

    # ------------------------------------------------------------------ any thread

    @property
    def transport_name(self) -> str:
        return self._transport.name

    def offer(self) -> pb.RankOffer:
        """For TransportOffer.ranks of this worker."""
        return self._offer

    def connect(
        self, peer: str, offer: pb.TransportOffer, callback: Callable[[Connected], None], *, shard: int = 0
    ) -> None:
        """Reaches shard `shard` of a source, named `peer` in pulls (its incarnation), and warms the pair up.

        Checks the geometry, prepares all descriptors, reads the null block a few times by each way that there is,
        keeps to the fastest and reports its rate. A peer that is connected already is only measured again.
        """
        self._post(lambda: self._connect(peer, offer, shard, callback))

    def disconnect(self, peer: str) -> None:
        """Later pulls from it are LOST; reads in flight end as they would have."""
        self._post(lambda: self._disconnect(peer))

    def submit(self, pull: Pull) -> None:
        """`on_done` is called once for it, and again after STUCK. Its destination blocks belong to this executor until
        the last of these calls."""
        self._post(lambda: self._begin(pull))

    def start(self) -> None:
        """Drives it from a daemon thread of its own."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, name=f"bytes-{self._rank}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and the transport. Pulls in flight are not reported: stop the engine first. Idempotent."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._transport.close()

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self._wake.set()

    # ------------------------------------------------------------------ driving thread

    def run_once(self) -> bool:
        """Takes all commands, polls every read once. True while reads are in flight."""
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                break
            command()
        now = self._clock()
        self._jobs = [job for job in self._jobs if not self._moved(job, now)]
        self._stuck = [job for job in self._stuck if not self._unstuck(job)]
        return bool(self._jobs)

    def _run(self) -> None:
        try:
            self._drive()
        except BaseException as error:
            self.failure = error
            log.critical("the bytes thread of rank %d has ended: no pull is reported any more", self._rank)
            raise

    def _drive(self) -> None:
        pause = POLL_S
        while True:
            self._wake.clear()
            if self._stopping:  # after the clear, which may have swallowed the call for it
                return
            num_posted = self._num_posted
            if self.run_once():
                pause = pause if num_posted == self._num_posted else POLL_S
                self._wake.wait(pause)
                pause = min(2 * pause, MAX_POLL_S)
            else:
                pause = POLL_S
                self._wake.wait(STUCK_POLL_S if self._stuck else None)

    def _connect(self, peer: str, offer: pb.TransportOffer, shard: int, callback: Callable[[Connected], None]) -> None:
        link = self._links.get(peer) or self._closing.pop(peer, None)
        try:
            if offer.HasField("failure"):
                raise TransferError(f"{peer}: {offer.failure.message}")
            if offer.transport != self._transport.name:
                raise TransferError(
                    f"{peer} offers transport {offer.transport!r}, this worker {self._transport.name!r}"
                )
            if link is None:
                link = Link(peer, offer, shard, self._pool, self._landing, self._transport)
            self._links[peer] = link
            pairs = link.warm_up_pairs(WARM_UP_BYTES, WARM_UP_PAIRS)
            trial = Trial(link.ways, link.bytes_of(pairs))
            reads = self._post_reads(link.data_orders(pairs))
        except TransferError as error:
            callback(Connected(peer, self._rank, self._transport.name, error=error))
            return
        link.num_in_flight += 1
        self._jobs.append(_WarmUp(link, callback, pairs, trial, self._clock(), reads))

    def _post_reads(self, orders: Sequence[ReadOrder]) -> _Reads:
        self._num_posted += 1
        return _Reads(self._transport, orders)

    def _disconnect(self, peer: str) -> None:
        link = self._links.pop(peer, None)
        if link is None:
            return
        if link.num_in_flight:
            self._closing[peer] = link
        else:
            link.close()

    def _begin(self, pull: Pull) -> None:
        link = self._links.get(pull.peer)
        started = self._clock()
        try:
            if link is None:
                raise PeerLost(f"{pull.peer} is not connected")
            orders = link.data_orders(pull.pairs)
        except TransferError as error:
            self._on_done(Done(pull.id, self._rank, Outcome.LOST, error=str(error), transport=self._transport.name))
            return
        self._apply_raises(pull)
        link.num_in_flight += 1
        reads = self._post_reads(orders)
        self._jobs.append(_PullJob(pull, link, link.transport, link.bytes_of(pull.pairs), started, reads))

    def _apply_raises(self, pull: Pull) -> None:
        for group, table in enumerate(self._pool.generations):
            raises = [(each.block, each.generation) for each in pull.raises if each.group == group]
            if raises:
                table.raise_to(*zip(*raises, strict=True))

    def _moved(self, job: _PullJob | _WarmUp, now: float) -> bool:
        """True when the job is over."""
        if not job.reads.over():
            if now - job.started <= self._limits.stuck_read_s:
                return False
            self._stuck.append(job)
            self._give_up(job, now)
            return True
        if isinstance(job, _WarmUp):
            return self._warm_up_moved(job)
        return self._pull_moved(job)

    def _pull_moved(self, job: _PullJob) -> bool:
        if job.reads.error is None and not job.checking:
            job.checking = True
            job.reads = self._post_reads(job.link.generation_orders(job.pull.pairs))
            if not job.reads.over():
                return False
        seconds = self._clock() - job.started
        stale: tuple[int, ...] = ()
        late_read_s = min(self._limits.late_read_s, job.link.late_read_s or self._limits.late_read_s)
        if job.reads.error is not None:
            outcome = Outcome.LOST
        elif seconds > late_read_s:
            outcome = Outcome.LATE
        else:
            stale = job.link.stale(job.pull)
            outcome = Outcome.STALE if stale else Outcome.OK
        error = str(job.reads.error or "")
        self._land(job.link)
        self._report(job, outcome, job.num_bytes, seconds, stale, error)
        return True

    def _warm_up_moved(self, job: _WarmUp) -> bool:
        link, trial, error = job.link, job.trial, job.reads.error
        if error is None:
            trial.took(self._clock() - job.started)
        else:
            log.info("%s cannot be read by %s: %s", link.peer, trial.way, error)
            trial.failed(error)
        if not trial.over:
            link.choose(trial.way)
            job.started = self._clock()
            job.reads = self._post_reads(link.data_orders(job.pairs))
            return False
        best = trial.best
        if best is None:
            self._land(link)
            self._disconnect(link.peer)
            job.callback(Connected(link.peer, self._rank, self._transport.name, error=trial.error))
            return True
        link.choose(best)
        connected = Connected(link.peer, self._rank, link.transport, trial.rates[best], rates=trial.rates)
        self._land(link)
        job.callback(connected)
        return True

    def _give_up(self, job: _PullJob | _WarmUp, now: float) -> None:
        seconds = now - job.started
        message = f"a read from {job.link.peer} by {job.link.transport} has not completed after {seconds:.1f} s"
        log.warning("%s; given up", message)
        if isinstance(job, _WarmUp):
            self._disconnect(job.link.peer)
            job.callback(Connected(job.link.peer, self._rank, self._transport.name, error=TransferError(message)))
        else:
            self._report(job, Outcome.STUCK, 0, seconds, error=message)

    def _unstuck(self, job: _PullJob | _WarmUp) -> bool:
        if not job.reads.over():
            return False
        self._land(job.link)
        if isinstance(job, _PullJob):
            seconds = self._clock() - job.started
            error = f"given up before; over after {seconds:.1f} s"
            self._report(job, Outcome.LOST, 0, seconds, error=error)
        return True

    def _report(
        self,
        job: _PullJob,
        outcome: Outcome,
        num_bytes: int,
        seconds: float,
        stale: tuple[int, ...] = (),
        error: str = "",
    ) -> None:
        self._on_done(Done(job.pull.id, self._rank, outcome, num_bytes, seconds, stale, error, job.transport))

    def _land(self, link: Link) -> None:
        link.num_in_flight -= 1
        if link.num_in_flight == 0 and self._closing.get(link.peer) is link:
            del self._closing[link.peer]
            link.close()

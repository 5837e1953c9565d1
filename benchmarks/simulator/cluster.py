"""A router and its workers in virtual time, and what became of each request of a trace."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from math import inf

from benchmarks.simulator.cores import Cores
from benchmarks.simulator.fetching import Fetching
from benchmarks.simulator.step_cost import StepCost
from benchmarks.simulator.trace import TRACE_BLOCK, TraceRequest
from benchmarks.simulator.virtual_time import run
from benchmarks.simulator.worker import Shape, SimulatedWorker
from cluster.config import LimitsConfig, LogConfig, Role, RouterConfig
from cluster.errors import Busy
from cluster.log import Log
from cluster.membership import Member, Membership, MemberState, Rank
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import SamplingParams
from cluster.session import Session
from router.admission import Place
from router.dispatcher import Dispatcher
from router.entrance import Entrance
from router.fleet import Fleet
from router.flight import Flight, Receipt, RouterRequest
from router.navigator import Navigator
from workers.engine.scheduler import SchedulerLimits

_COMPATIBILITY = b"simulated".ljust(16)
_LIMITS = SchedulerLimits(
    max_batched_tokens=8192, max_sequences=256, max_model_len=1 << 17, prefill_reserve=0.1, chunk_tokens=2048
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is simulated. `num_workers` by role; a pool has the name of its role. `num_cores`: that all workers compute
    their steps on, beside `num_others` that compute all the time; inf: each has a machine of its own."""

    num_workers: dict[Role, int] = field(default_factory=lambda: {Role.PREFILL: 8, Role.DECODE: 8})
    cost: StepCost
    num_blocks: int = 8192
    block_size: int = 64
    trace_block: int = TRACE_BLOCK
    vocab_size: int = 1 << 31
    router: RouterConfig = field(default_factory=RouterConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    scheduler: SchedulerLimits = _LIMITS
    num_cores: float = inf
    num_others: float = 0.0

    def with_router(self, router: RouterConfig) -> Setup:
        return replace(self, router=router)

    @property
    def shape(self) -> Shape:
        return Shape(cost=self.cost, num_blocks=self.num_blocks, block_size=self.block_size, limits=self.scheduler)


@dataclass(slots=True)
class Record:
    """One request; seconds after the start of the run."""

    request: TraceRequest
    at_s: float
    first_at_s: float | None = None
    last_at_s: float | None = None
    num_tokens: int = 0
    hit_tokens: int = 0  # of the prompt, that were cached where it was computed
    fetched_tokens: int = 0  # and of it, that were fetched from another cache
    refused: bool = False

    @property
    def complete(self) -> bool:
        return self.last_at_s is not None

    @property
    def ttft_s(self) -> float:
        assert self.first_at_s is not None
        return self.first_at_s - self.at_s

    @property
    def mean_gap_s(self) -> float:
        """Between two tokens."""
        assert self.first_at_s is not None and self.last_at_s is not None
        return (self.last_at_s - self.first_at_s) / max(1, self.num_tokens - 1)


class SimulatedCluster:
    """Inside a run in virtual time."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.workers: dict[str, SimulatedWorker] = {}  # by incarnation, those that live
        self._loop = asyncio.get_running_loop()
        self._cores = Cores(setup.num_cores, setup.num_others, self._loop)
        self._fetchings: dict[str, Fetching] = {}
        self._members: dict[str, Member] = {}
        self._version = 0
        self._num_started = 0
        metrics, log = Metrics(), Log.open("router", LogConfig(level="error"))
        self._fleet = Fleet()
        self._navigator = Navigator(
            setup.router, self._fleet, metrics, log, self._loop.call_soon, block_size=setup.block_size
        )
        self._dispatcher = Dispatcher(
            setup.router, self._fleet, self._navigator, metrics, log, block_size=setup.block_size
        )
        self._entrance = Entrance(setup.limits, self._fleet, self._navigator, self._dispatcher, metrics)
        self._open: dict[str, tuple[Flight, Place, Record]] = {}
        self._is_over = asyncio.Event()
        self._num_unfinished = 0
        for role, number in setup.num_workers.items():
            for _ in range(number):
                self.add(role)

    # ------------------------------------------------------------ workers come and go

    def add(self, role: Role) -> SimulatedWorker:
        name = f"{role}-{self._num_started}"
        self._num_started += 1
        member = Member(
            name=name,
            pool=role.value,
            incarnation=blake2b(name.encode(), digest_size=16).hexdigest(),
            address=f"simulated:{self._num_started}",
            roles=(role,),
            ranks=(Rank(rank=0),),
            compatibility_hash=_COMPATIBILITY,
            state=MemberState.READY,
        )
        worker = SimulatedWorker(member, self.setup.shape, self._cores, self.workers, self._fetchings, self, self._loop)
        self.workers[member.incarnation] = worker
        self._members[member.incarnation] = member
        self._announce()
        self._fleet.opened(worker.line)
        if self._navigator.uses_blocks:
            self._navigator.feed.opened(worker.line, member, self._loop.time())
        worker.start()
        return worker

    def serving(self, role: Role) -> list[SimulatedWorker]:
        """Those that take new requests."""
        return [each for each in self.workers.values() if role in each.member.roles and not each.draining]

    def remove(self, worker: SimulatedWorker) -> None:
        """It takes nothing new, and goes when it has nothing left."""
        worker.draining = True
        self._fleet.leaving(worker.line)
        self._remove_when_idle(worker)

    def _remove_when_idle(self, worker: SimulatedWorker) -> None:
        if worker.num_open or any(worker.member.incarnation in other.sources for other in self.workers.values()):
            self._loop.call_later(1.0, self._remove_when_idle, worker)
            return
        incarnation = worker.member.incarnation
        del self.workers[incarnation], self._fetchings[incarnation], self._members[incarnation]
        self._announce()
        self._navigator.feed.gone(incarnation)

    def _announce(self) -> None:
        self._version += 1
        self._fleet.update(Membership(self._version, tuple(self._members.values())))

    # ------------------------------------------------------------ requests

    async def replay(self, trace: Sequence[TraceRequest]) -> list[Record]:
        """All of it; returns when the last request has ended and the workers have nothing left to do."""
        start = self._loop.time()
        records = [Record(request, start + request.at_ms / 1000) for request in trace]
        self._num_unfinished = len(records)
        self._arrive(deque(enumerate(records)))
        if records:
            await self._is_over.wait()
        while any(worker.num_open for worker in self.workers.values()):
            await asyncio.sleep(self.setup.cost.words)
        return records

    def _arrive(self, coming: deque[tuple[int, Record]]) -> None:
        """Those whose time has come, in order; then again when the next one comes. Timers of one time have no order."""
        while coming:
            number, record = coming[0]
            due = record.at_s + self.setup.cost.front
            if due > self._loop.time():
                self._loop.call_at(due, self._arrive, coming)
                return
            coming.popleft()
            self._enter(f"r{number}", record)

    def _enter(self, request_id: str, record: Record) -> None:
        trace = record.request
        request = RouterRequest(
            request_id=request_id,
            prompt_token_ids=tuple(trace.prompt(self.setup.vocab_size, self.setup.trace_block)),
            sampling=SamplingParams(max_tokens=trace.num_output, ignore_eos=True),
            session=trace.session if self.setup.router.affinity_header else "",
        )
        flight = self._dispatcher.open(request, None)
        try:
            place = self._entrance.enter(flight)
        except Busy:
            record.refused = True
            self._dispatcher.settle(flight, "refused")
            self._ended()
            return
        self._open[request_id] = flight, place, record

    def heard(self, session: Session, frame: pb.Frame) -> None:
        """As the router hears it."""
        if frame.HasField("load_report"):
            self._fleet.reported(session, frame.load_report)
            self._navigator.feed.reported(session, frame.load_report, self._loop.time())
            self._dispatcher.place_waiting()
        for tokens in frame.step_tokens.sequences:
            self._received(session, tokens)

    def heard_blocks(self, session: Session, events: pb.BlockEvents) -> None:
        if self._navigator.uses_blocks:
            self._navigator.feed.heard(session, events, self._loop.time())

    def _received(self, session: Session, tokens: pb.SequenceTokens) -> None:
        flight, place, record = self._open[tokens.key.request_id]
        receipt = flight.receive(session.id, tokens)
        assert receipt is Receipt.TAKEN, f"{receipt} of {tokens}"
        flight.take()
        self._entrance.generated(place, len(tokens.token_ids))
        now = self._loop.time()
        if record.first_at_s is None:
            record.first_at_s = now
        if flight.finish is not None:
            assert flight.route is not None
            record.last_at_s = now
            record.num_tokens = len(flight.emitted)
            local = flight.route.local_prefill
            record.hit_tokens = (
                flight.route.decode_prefix_hit_tokens if local else flight.route.prefill_prefix_hit_tokens
            )
            record.fetched_tokens = flight.route.fetched.blocks * self.setup.block_size
            del self._open[tokens.key.request_id]
            self._dispatcher.settle(flight, "it has ended")
            self._entrance.leave(place)
            self._ended()

    def _ended(self) -> None:
        self._num_unfinished -= 1
        if not self._num_unfinished:
            self._is_over.set()


def simulate(setup: Setup, trace: Sequence[TraceRequest]) -> list[Record]:
    """What becomes of each request of the trace. Deterministic."""

    async def scene() -> list[Record]:
        return await SimulatedCluster(setup).replay(trace)

    return run(scene())

"""The sources this worker may read from: a session to each, and its blocks within reach and measured.

    dialed ──on_open: TransportQuery──▶ asked ──TransportOffer──▶ connecting ──every rank connected──▶ WARM
       ▲                                               ▲              │ refused, or too slow: said once,  │
       │                                               ├──────────────┘ tried again after a pause         │
       │                                               └───────────── a read failed: measured again ──────┤
       └──────────────── session broken: executors disconnect ◀───────────────────────────────────────────┘

Only warm pairs are used, so the first long prompt never pays for connections. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from cluster.config import Role
from cluster.log import Log
from cluster.membership import Member, MemberState
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.session import Session
from kvtransfer.connector import Connected, Executor, Outcome, PullResult, names_together
from workers.rate import Rate

FIRST_PAUSE_S = 0.5  # before a source that could not be read is tried again, doubling
MAX_PAUSE_S = 30.0


def worth_reading(members: Iterable[Member], me: str, roles: Collection[Role], max_holders: int) -> list[Member]:
    """Of the compatible members, whom worker `me` (incarnation) should be paired with: a decode worker with all that
    compute prompts, both with all encoders, and anybody with at most `max_holders` others, whose caches it may fetch
    from. Those are each worker's own choice, the same as long as they live, so that holders are asked evenly."""
    others = [m for m in members if m.address and m.state is not MemberState.GONE and m.incarnation != me]
    runs_decoders = Role.DECODE in roles or Role.PREFILL in roles
    needed = [
        m
        for m in others
        if (Role.DECODE in roles and Role.PREFILL in m.roles) or (runs_decoders and Role.ENCODE in m.roles)
    ]
    holders = [m for m in others if m not in needed]
    holders.sort(key=lambda m: blake2b(f"{me}\0{m.incarnation}".encode(), digest_size=8).digest())
    return needed + holders[:max_holders]


def offered_to(
    query: pb.TransportQuery, executors: Sequence[Executor], name: str, late_read_s: float
) -> pb.TransportOffer:
    """What a sink needs to read the blocks of this worker."""
    transport = executors[0].transport_name
    if transport not in query.transports:
        text = f"{name} has {transport}, the sink {', '.join(query.transports)}; start both with one version"
        return pb.TransportOffer(failure=pb.Failure(code=pb.INCOMPATIBLE, message=text))
    ranks = [executor.offer() for executor in executors]
    return pb.TransportOffer(transport=transport, ranks=ranks, late_read_ms=int(late_read_s * 1000))


@dataclass(slots=True)
class _Pair:
    session: Session
    offer: pb.TransportOffer | None = None
    connected: dict[int, Connected] = field(default_factory=dict)  # by our rank
    warm: bool = False
    rate: Rate = field(default_factory=Rate)  # bytes, of reads
    failure: str = ""  # of the last try
    pause_s: float = FIRST_PAUSE_S
    retry_at: float | None = None

    @property
    def transport(self) -> str:
        """What moves the blocks; "" before any rank is connected."""
        return names_together(each.transport for each in self.connected.values())

    def cool(self) -> None:
        """WARM -> connecting."""
        self.warm = False
        self.connected.clear()


class Pairs:
    """`post` hands a Connected, made on a bytes thread, to `connected` on the engine thread."""

    def __init__(
        self, executors: Collection[Executor], post: Callable[[Session, Connected], None], metrics: Metrics, log: Log
    ) -> None:
        self._executors = executors
        self._post = post
        self._metrics = metrics
        self._log = log
        self._pairs: dict[str, _Pair] = {}  # by the source's incarnation
        self._rated: dict[str, str] = {}  # by name: under which transport its rate is shown
        self.changed = False  # since the last report
        self.closed: set[str] = set()  # sources, by incarnation, that take no new prompts

    def opened(self, session: Session) -> None:
        """A session that we dialed to a worker with blocks."""
        self._pairs[session.peer.incarnation] = _Pair(session)
        transports = sorted({executor.transport_name for executor in self._executors})
        session.send(pb.Frame(transport_query=pb.TransportQuery(transports=transports)))

    def offered(self, session: Session, offer: pb.TransportOffer) -> None:
        pair = self._pairs.get(session.peer.incarnation)
        if pair is None or pair.session is not session:
            return
        if offer.HasField("failure"):
            self._log.warning("source cannot be read", peer=session.peer.name, reason=offer.failure.message)
            return
        pair.offer = offer
        self._connect(pair)

    def tick(self, now: float) -> None:
        """Tries again what failed: a cable may have been out."""
        for pair in self._pairs.values():
            if pair.retry_at is not None and pair.retry_at <= now:
                self._connect(pair)

    def _connect(self, pair: _Pair) -> None:
        """Ranks that are connected are only measured again."""
        session, pair.retry_at = pair.session, None
        assert pair.offer is not None
        for executor in self._executors:
            executor.connect(session.peer.incarnation, pair.offer, lambda result: self._post(session, result))

    def connected(self, session: Session, result: Connected, now: float) -> None:
        pair = self._pairs.get(session.peer.incarnation)
        if pair is None or pair.session is not session:
            return
        if result.error is not None:
            if pair.failure != str(result.error):
                pair.failure = str(result.error)
                self._log.warning("source cannot be read", peer=session.peer.name, reason=pair.failure)
            pair.retry_at = now + pair.pause_s
            pair.pause_s = min(2 * pair.pause_s, MAX_PAUSE_S)
            return
        pair.connected[result.rank] = result
        pair.warm = len(pair.connected) == len(self._executors)
        if pair.warm:
            pair.failure, pair.pause_s = "", FIRST_PAUSE_S
        self.changed = True
        rate = min(each.bytes_per_s for each in pair.connected.values())
        name, transport = session.peer.name, pair.transport
        shown = self._rated.setdefault(name, transport)
        if shown != transport:
            self._metrics.transfer_rate.remove(shown, name)
            self._rated[name] = transport
        self._metrics.transfer_rate.labels(transport, name).set(rate)
        slower = {way: found for way, found in result.rates.items() if way != result.transport}
        log = self._log
        if slower:
            log = log.bind(rejected=", ".join(f"{way} at {found:.3g} bytes/s" for way, found in slower.items()))
        log.info("source is warm", peer=name, transport=transport, rate_bytes_per_s=rate)

    def broken(self, session: Session) -> None:
        pair = self._pairs.get(session.peer.incarnation)
        if pair is None or pair.session is not session:
            return
        del self._pairs[session.peer.incarnation]
        self.changed = True
        for executor in self._executors:
            executor.disconnect(session.peer.incarnation)

    def warm(self, incarnation: str) -> Session | None:
        """The session to a source that can be read now."""
        pair = self._pairs.get(incarnation)
        return pair.session if pair is not None and pair.warm and pair.session.open else None

    def pick(self, wanted: Iterable[pb.WorkerRef], exclude: Collection[str]) -> Session | None:
        """The first warm source among `wanted`, else any other, never one of `exclude` (incarnations) or a closed
        one."""
        refused = {*exclude, *self.closed}
        candidates = (each for each in (*(ref.incarnation for ref in wanted), *self._pairs) if each not in refused)
        return next((session for each in candidates if (session := self.warm(each)) is not None), None)

    def transport(self, session: Session) -> str:
        """What moves blocks from there; "" of a source that cannot be read."""
        pair = self._pairs.get(session.peer.incarnation)
        return pair.transport if pair else ""

    def read(self, result: PullResult) -> None:
        """Of a source, whatever became of its pair: how fast its bytes come counts from the first read on. One that
        failed may be the first to tell that the source is dead: none is asked for anything before it is read again."""
        pair = self._pairs.get(result.pull.peer)
        if pair is None:
            return
        pair.rate.measured(result.num_bytes, result.seconds)
        if result.outcome is Outcome.LOST and pair.warm:
            pair.cool()
            self.changed = True
            self._connect(pair)

    def reports(self) -> list[pb.PairReport]:
        """For load reports: what the router may pair."""
        return [
            pb.PairReport(
                source_incarnation=incarnation,
                warm=pair.warm and pair.session.open,
                transport=pair.transport,
                bytes_per_s=pair.rate.per_s or min((c.bytes_per_s for c in pair.connected.values()), default=0.0),
            )
            for incarnation, pair in self._pairs.items()
        ]

"""What one router knows of the workers: membership, open sessions, load reports, and what it just sent them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.config import Role
from cluster.membership import Member, Membership, MemberState
from cluster.protos import worker_pb2 as pb
from cluster.session import Session
from router.plan import Candidate
from router.status import FleetTold, WorkerTold, pairs_told, shard_told


@dataclass(slots=True)
class _Shard:
    """The last load report of one shard, and what this router sent since."""

    num_open: int = 0  # may fall below 0: what has ended since may have ended before the report, too
    queued_tokens: int = 0
    queued_encoder_tokens: int = 0
    draining: bool = False
    num_available_blocks: int | None = None
    block_bytes: int = 0
    prefill_tokens_per_s: float = 0.0
    warm_sources: Mapping[str, float] = field(default_factory=dict)  # the same object as long as nothing changes
    report: pb.LoadReport | None = None  # the last one

    @classmethod
    def of(cls, report: pb.LoadReport, before: _Shard | None) -> _Shard:
        warm = {pair.source_incarnation: pair.bytes_per_s for pair in report.pairs if pair.warm}
        if before is not None and before.warm_sources == warm:
            warm = before.warm_sources
        available = min((group.free + group.cached for group in report.groups), default=None)
        return cls(
            num_open=report.num_waiting + report.num_running + report.num_pulling,
            queued_tokens=report.queued_prefill_tokens,
            queued_encoder_tokens=report.queued_encoder_tokens,
            draining=report.draining,
            num_available_blocks=available,
            block_bytes=report.block_bytes,
            prefill_tokens_per_s=report.prefill_tokens_per_s,
            warm_sources=warm,
            report=report,
        )


@dataclass(slots=True)
class _Worker:
    member: Member
    session: Session | None = None
    leaving: bool = False  # said Goodbye
    shards: dict[int, _Shard] = field(default_factory=dict)

    def candidate(self, number: int) -> Candidate:
        member, shard = self.member, self.shards[number]
        return Candidate(
            name=member.name,
            incarnation=member.incarnation,
            shard=number,
            roles=frozenset(member.roles),
            compatibility_hash=member.compatibility_hash,
            pid=member.pid,
            connected=self.session is not None,
            num_requests=max(0, shard.num_open),
            queued_tokens=shard.queued_tokens,
            num_available_blocks=shard.num_available_blocks,
            block_bytes=shard.block_bytes,
            prefill_tokens_per_s=shard.prefill_tokens_per_s,
            queued_encoder_tokens=shard.queued_encoder_tokens,
            warm_sources=shard.warm_sources,
        )

    def told(self) -> WorkerTold:
        member = self.member
        return WorkerTold(
            name=member.name,
            incarnation=member.incarnation,
            pool=member.pool,
            state=member.state.value,
            roles=tuple(role.value for role in member.roles),
            pid=member.pid,
            connected=self.session is not None,
            leaving=self.leaving,
            shards=tuple(
                shard_told(number, shard.report)
                for number, shard in sorted(self.shards.items())
                if shard.report is not None and self.session is not None  # what a lost one said is long over
            ),
        )


class Fleet:
    """The members that are not GONE, by incarnation. One thread."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}
        self._seen: dict[tuple[str, int], Candidate] | None = None  # by incarnation and shard; None: others are
        self._stale: set[tuple[str, int]] = set()  # of them, those whose load has changed
        self.generation = 0  # of candidates: rises when one comes, goes or gets or loses its session

    def update(self, membership: Membership) -> tuple[list[Member], list[str]]:
        """(members to dial, incarnations to drop). The caller gives the latest: a new controller counts anew."""
        self._seen = None
        members = {m.incarnation: m for m in membership.members if m.state is not MemberState.GONE}
        left = [incarnation for incarnation in self._workers if incarnation not in members]
        for incarnation in left:
            del self._workers[incarnation]
        dial: list[Member] = []
        for incarnation, member in members.items():
            worker = self._workers.get(incarnation)
            if member.address and (worker is None or worker.member.address != member.address):
                dial.append(member)
            if worker is None:
                shards = {rank.shard: _Shard() for rank in member.ranks}
                self._workers[incarnation] = _Worker(member, shards=shards)
            else:
                worker.member = member
                for rank in member.ranks:
                    worker.shards.setdefault(rank.shard, _Shard())
        return dial, left

    def opened(self, session: Session) -> bool:
        """False if it is a session to nobody that is a member."""
        worker = self._workers.get(session.peer.incarnation)
        if worker is None:
            return False
        self._seen = None
        worker.session = session
        worker.leaving = False
        worker.shards = {shard: _Shard() for shard in worker.shards}  # a fresh session: reports of the old one are old
        return True

    def broken(self, session: Session) -> None:
        worker = self._workers.get(session.peer.incarnation)
        if worker is not None and worker.session is session:
            self._seen = None
            worker.session = None

    def leaving(self, session: Session) -> None:
        """The worker said Goodbye: no new requests."""
        worker = self._workers.get(session.peer.incarnation)
        if worker is not None and worker.session is session:
            self._seen = None
            worker.leaving = True

    def reported(self, session: Session, report: pb.LoadReport) -> None:
        worker = self._workers.get(session.peer.incarnation)
        if worker is not None and worker.session is session:
            before = worker.shards.get(report.shard)
            worker.shards[report.shard] = _Shard.of(report, before)
            if before is None or before.draining != report.draining:
                self._seen = None
            self._stale.add((session.peer.incarnation, report.shard))

    def sent(
        self, candidate: Candidate, *, num_requests: int = 0, num_tokens: int = 0, num_encoder_tokens: int = 0
    ) -> None:
        """Counts until the worker's next report includes it."""
        worker = self._workers.get(candidate.incarnation)
        shard = worker.shards.get(candidate.shard) if worker else None
        if shard is not None:
            shard.num_open += num_requests
            shard.queued_tokens += num_tokens
            shard.queued_encoder_tokens += num_encoder_tokens
            self._stale.add((candidate.incarnation, candidate.shard))

    def ended(self, candidate: Candidate) -> None:
        """A request there is over: counts until the next report, too."""
        self.sent(candidate, num_requests=-1)

    def session(self, incarnation: str) -> Session | None:
        worker = self._workers.get(incarnation)
        return worker.session if worker else None

    def sessions(self) -> list[Session]:
        return [worker.session for worker in self._workers.values() if worker.session is not None]

    def member(self, incarnation: str) -> Member | None:
        worker = self._workers.get(incarnation)
        return worker.member if worker else None

    def expects(self, role: Role) -> bool:
        """Whether any member, ready or not, has this role."""
        return any(role in worker.member.roles for worker in self._workers.values())

    def told(self, max_pairs: int) -> FleetTold:
        """All members, with what each that is connected said of itself last."""
        names = {incarnation: worker.member.name for incarnation, worker in self._workers.items()}
        workers = sorted(self._workers.values(), key=lambda each: (each.member.name, each.member.incarnation))
        reports = [
            (worker.member.name, shard.report)
            for worker in workers
            for shard in worker.shards.values()
            if shard.report is not None and worker.session is not None
        ]
        return FleetTold(
            workers=tuple(worker.told() for worker in workers),
            num_pairs=sum(len(report.pairs) for _, report in reports),
            pairs=tuple(pairs_told(reports, names, max_pairs)),
        )

    def candidates(self) -> list[Candidate]:
        """The shards of all workers that take new requests, in the same order as long as `generation` is the same."""
        if self._seen is None:
            self.generation += 1
            self._seen = {
                (incarnation, number): worker.candidate(number)
                for incarnation, worker in self._workers.items()
                if worker.member.state is MemberState.READY and not worker.leaving
                for number, shard in worker.shards.items()
                if not shard.draining
            }
        for incarnation, number in self._stale:
            if (incarnation, number) in self._seen:
                self._seen[incarnation, number] = self._workers[incarnation].candidate(number)
        self._stale.clear()
        return list(self._seen.values())

"""A second pair of eyes on the workers: asks one of them, which a router, asking all, cannot while one is frozen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from uuid import uuid4

from cluster.errors import SessionError
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.rpc import Dialer
from cluster.session import Session
from tests.support.plain_cluster import SECRET, PlainCluster, WorkerProcess

DEADLINE_S = 30.0


class Watch:
    """A peer of kind TOOL with a session to each worker of a cluster, on the router's words thread."""

    def __init__(self, cluster: PlainCluster) -> None:
        self._cluster = cluster
        self._ids = count(1)
        self._sessions: dict[str, Session] = {}
        self._open: dict[tuple[str, int], Future[pb.AdminResponse]] = {}
        identity = pb.Identity(kind=pb.TOOL, name="watch", incarnation=uuid4().hex)
        self._dialer = Dialer(cluster.words, identity, SECRET, self)

    # ------------------------------------------------------------ from the test's loop

    async def ask(self, name: str) -> pb.AdminResponse:
        """Load and counters of one worker, now."""
        member = self._cluster.workers[name].member
        assert member is not None
        self._dialer.keep(member.address, member.incarnation)
        async with asyncio.timeout(DEADLINE_S):
            while True:
                session = self._sessions.get(member.incarnation)
                if session is None:
                    await asyncio.sleep(0.005)
                    continue
                answer: Future[pb.AdminResponse] = Future()
                number = next(self._ids)
                self._open[session.id, number] = answer
                session.send(pb.Frame(admin_request=pb.AdminRequest(id=number, load=True)))
                return await asyncio.wrap_future(answer)

    async def load(self, name: str) -> pb.LoadReport:
        return (await self.ask(name)).load

    async def counter(self, name: str, metric: str) -> float:
        """One metric of one worker, all labels added up."""
        counters = (await self.ask(name)).counters
        return sum(value for key, value in counters.items() if key.partition("|")[0] == metric)

    async def until(self, name: str, holds: Callable[[pb.LoadReport], bool], what: str) -> pb.LoadReport:
        """Asks again and again; the load for which it held."""
        load = pb.LoadReport()
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not holds(load := await self.load(name)):
                    await asyncio.sleep(0.001)
        except TimeoutError:
            raise AssertionError(f"{name}: not within {DEADLINE_S:g} s: {what}; {load}") from None
        return load

    def forget(self, incarnation: str) -> None:
        """It is dead: nobody asks it any more."""
        self._dialer.drop(incarnation)

    def _workers(self) -> list[WorkerProcess]:
        return list(self._cluster.workers.values())

    def stop(self) -> None:
        self._dialer.stop()

    # ------------------------------------------------------------ words thread

    def on_open(self, session: Session) -> None:
        self._sessions[session.peer.incarnation] = session

    def on_frame(self, session: Session, frame: pb.Frame) -> None:
        if frame.WhichOneof("kind") == "admin_response":
            answer = self._open.pop((session.id, frame.admin_response.id), None)
            if answer is not None and not answer.done():
                answer.set_result(frame.admin_response)

    def on_bulk(self, session: Session, topic: str, payload: bytes) -> None: ...

    def on_broken(self, session: Session, error: SessionError) -> None:
        if self._sessions.get(session.peer.incarnation) is session:
            del self._sessions[session.peer.incarnation]
        if not any(w.member and w.member.incarnation == session.peer.incarnation for w in self._workers()):
            self._dialer.drop(session.peer.incarnation)
        for key in [key for key in self._open if key[0] == session.id]:
            answer = self._open.pop(key)
            if not answer.done():
                answer.set_exception(error)

    def on_overflow(self, session: Session, key: RequestKey) -> None: ...

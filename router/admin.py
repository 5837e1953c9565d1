"""Questions to workers about themselves: load, counters, clear the cache."""

from __future__ import annotations

import asyncio
from itertools import count

from cluster.protos import worker_pb2 as pb
from cluster.session import Session
from router.fleet import Fleet

ANSWER_S = 10.0


class Admin:
    """Asks every connected worker and collects the answers. The router's loop only."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._ids = count(1)
        self._open: dict[tuple[str, int], asyncio.Future[pb.AdminResponse | None]] = {}

    async def ask(self, request: pb.AdminRequest) -> dict[str, pb.AdminResponse]:
        """Answers by incarnation. A worker whose session breaks, or that is silent for `ANSWER_S`, has none."""
        request.id = next(self._ids)
        waiting: dict[str, asyncio.Future[pb.AdminResponse | None]] = {}
        for session in self._fleet.sessions():
            answer = asyncio.get_running_loop().create_future()
            self._open[session.id, request.id] = waiting[session.peer.incarnation] = answer
            session.send(pb.Frame(admin_request=request))
        try:
            if waiting:
                await asyncio.wait(waiting.values(), timeout=ANSWER_S)
        finally:
            self._open = {key: answer for key, answer in self._open.items() if key[1] != request.id}
        answers = {incarnation: answer.result() for incarnation, answer in waiting.items() if answer.done()}
        return {incarnation: answer for incarnation, answer in answers.items() if answer is not None}

    def answered(self, session: Session, response: pb.AdminResponse) -> None:
        answer = self._open.pop((session.id, response.id), None)
        if answer is not None and not answer.done():
            answer.set_result(response)

    def broken(self, session: Session) -> None:
        for key in [key for key in self._open if key[0] == session.id]:
            answer = self._open.pop(key)
            if not answer.done():
                answer.set_result(None)

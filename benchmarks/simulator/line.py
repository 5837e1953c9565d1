"""The words between the router and a simulated worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cluster.membership import Member
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.session import Session


class Ear(Protocol):
    """Where the router hears a worker."""

    def heard(self, session: Session, frame: pb.Frame) -> None: ...

    def heard_blocks(self, session: Session, events: pb.BlockEvents) -> None: ...


class Line(Session):
    """The router's end of a session: `hear` takes what it sends."""

    def __init__(self, hear: Callable[[pb.Frame], None], member: Member) -> None:
        self.peer = pb.Identity(kind=pb.WORKER, name=member.name, incarnation=member.incarnation)
        self.id = member.incarnation
        self._hear = hear

    def send(self, frame: pb.Frame, key: RequestKey | None = None) -> None:
        self._hear(frame)

"""One worker as its pool sees it."""

from __future__ import annotations

import time
from typing import Any

from cluster.membership import Member
from cluster.reconcile import Standing
from cluster.worker_spec import ActorName

ActorHandle = Any  # a Ray handle: its methods exist at run time only


class PooledWorker:
    """One actor and what the pool knows of it. Mutable; owned by the pool."""

    __slots__ = (
        "actor", "actor_name", "asked_at", "fingerprint", "index", "leaving", "member", "placed", "ready_at", "retired",
    )  # fmt: skip

    def __init__(self, actor_name: ActorName, member: Member, fingerprint: str) -> None:
        self.actor_name = actor_name
        self.index = actor_name.index
        self.member = member
        self.fingerprint = fingerprint
        self.actor: ActorHandle = None  # until it was asked for
        self.asked_at = time.monotonic()
        self.ready_at: float | None = None
        self.placed = False  # the cluster has room for it
        self.leaving = False  # its node is to go
        self.retired = False  # its end is our wish, not a failure

    def standing(self, now: float) -> Standing:
        return Standing(
            incarnation=self.member.incarnation,
            index=self.index,
            fingerprint=self.fingerprint,
            state=self.member.state,
            placed=self.placed,
            age_s=now - self.asked_at,
            roles=self.member.roles,
            compatibility_hash=self.member.compatibility_hash,
            leaving=self.leaving,
        )

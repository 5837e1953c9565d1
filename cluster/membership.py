"""Who is alive: plain values that the controller publishes and everybody compares."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from cluster.config import Role


class MemberState(StrEnum):
    """
    STARTING ──ready──▶ READY ──drain──▶ DRAINING ──empty──▶ GONE
        └──────────────── dies ────────────┴──────────────────▲
    Only READY members get new requests; STARTING and DRAINING ones are dialed too, GONE ones are dropped.
    """

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One process of a worker and its place: `tp_rank` of `tp_size` in `shard`."""

    rank: int
    shard: int = 0
    tp_rank: int = 0
    tp_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One worker. A restart keeps `name` and gets another `incarnation`."""

    name: str
    pool: str
    incarnation: str  # uuid4 hex
    address: str  # host:port of its words server; empty while STARTING
    metrics_address: str = ""  # host:port of its exporter; empty while STARTING
    roles: tuple[Role, ...]
    ranks: tuple[Rank, ...] = (Rank(rank=0),)
    compatibility_hash: bytes = b""  # 16 bytes; empty until the model is loaded
    pid: int = 0  # of rank 0
    state: MemberState = MemberState.STARTING


class Change(NamedTuple):
    """What happened to one name: the member before and after."""

    before: Member
    after: Member


class Diff(NamedTuple):
    """By incarnation: a restarted worker has left and joined. Each tuple is in order of the names."""

    joined: tuple[Member, ...]
    left: tuple[Member, ...]
    changed: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Membership:
    """All members at one time; `version` rises with every change the controller publishes."""

    version: int = 0
    members: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        incarnations = [member.incarnation for member in self.members]
        assert len(set(incarnations)) == len(incarnations), f"an incarnation stands twice in {incarnations}"

    def find(self, incarnation: str) -> Member | None:
        return next((member for member in self.members if member.incarnation == incarnation), None)

    def ready(self, role: Role) -> tuple[Member, ...]:
        """Members that take new requests of a stage."""
        return tuple(m for m in self.members if m.state is MemberState.READY and role in m.roles)

    def next(self, members: Iterable[Member]) -> Membership:
        """The following version, or this one when nothing differs."""
        following = tuple(sorted(members, key=_order))
        return self if following == tuple(sorted(self.members, key=_order)) else Membership(self.version + 1, following)

    def to_wire(self) -> bytes:
        """JSON. Unknown keys are ignored by readers, so fields may be added."""
        members = [
            {
                "name": m.name,
                "pool": m.pool,
                "incarnation": m.incarnation,
                "address": m.address,
                "metrics_address": m.metrics_address,
                "roles": [role.value for role in m.roles],
                "ranks": [[r.rank, r.shard, r.tp_rank, r.tp_size] for r in m.ranks],
                "compatibility_hash": m.compatibility_hash.hex(),
                "pid": m.pid,
                "state": m.state.value,
            }
            for m in self.members
        ]
        return json.dumps({"version": self.version, "members": members}, separators=(",", ":")).encode()

    @classmethod
    def from_wire(cls, data: bytes) -> Membership:
        """Raises ValueError, with the reason, on anything that `to_wire` would not write."""
        try:
            tree = json.loads(data)
            return cls(int(tree["version"]), tuple(_member(entry) for entry in tree["members"]))
        except (KeyError, TypeError, AssertionError, RecursionError) as error:
            raise ValueError(f"no membership: {error!r} in {data[:80]!r}") from None


def diff(old: Membership, new: Membership) -> Diff:
    """GONE members count as absent."""
    before = {m.incarnation: m for m in old.members if m.state is not MemberState.GONE}
    after = {m.incarnation: m for m in new.members if m.state is not MemberState.GONE}
    return Diff(
        joined=_sorted(m for key, m in after.items() if key not in before),
        left=_sorted(m for key, m in before.items() if key not in after),
        changed=tuple(
            Change(before[m.incarnation], m)
            for m in _sorted(after.values())
            if m.incarnation in before and before[m.incarnation] != m
        ),
    )


def _member(entry: Mapping[str, Any]) -> Member:
    return Member(
        name=_text(entry["name"]),
        pool=_text(entry["pool"]),
        incarnation=_text(entry["incarnation"]),
        address=_text(entry["address"]),
        metrics_address=_text(entry.get("metrics_address", "")),  # a worker of an older release has none
        roles=tuple(Role(role) for role in entry["roles"]),
        ranks=tuple(
            Rank(rank=int(rank), shard=int(shard), tp_rank=int(tp_rank), tp_size=int(tp_size))
            for rank, shard, tp_rank, tp_size in entry["ranks"]
        ),
        compatibility_hash=bytes.fromhex(entry["compatibility_hash"]),
        pid=int(entry["pid"]),
        state=MemberState(entry["state"]),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _order(member: Member) -> tuple[str, str]:
    return member.name, member.incarnation


def _sorted(members: Iterable[Member]) -> tuple[Member, ...]:
    return tuple(sorted(members, key=_order))

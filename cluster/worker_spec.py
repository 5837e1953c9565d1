"""What the controller and the actor of a worker tell each other, as plain values, and how actors are named."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from cluster.config import SluiceConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """All that an actor is told about the worker it wraps. `config`: the whole SluiceConfig as JSON."""

    name: str
    pool: str
    incarnation: str
    fingerprint: str
    config: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a running actor says of itself: `member` is the Membership wire of one member."""

    member: bytes
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a place is empty: the last error, and how many there were in a row.

    `lasting`: an error that says what to change (SluiceError); the next start will meet it too.
    """

    worker: str
    count: int
    error: str
    lasting: bool


@dataclass(frozen=True, slots=True)
class ActorName:
    app: str
    pool: str
    index: int
    incarnation8: str

    def __str__(self) -> str:
        return f"{self.app}:{self.pool}:{self.index}:{self.incarnation8}"

    @classmethod
    def parse(cls, text: str) -> ActorName | None:
        """None: not the name of a worker."""
        parts = text.split(":")
        if len(parts) != 4 or not parts[2].isdecimal():
            return None
        return cls(parts[0], parts[1], int(parts[2]), parts[3])


def fingerprint(config: SluiceConfig, pool: str) -> str:
    """Of everything in the config that a worker of `pool` is made of: another one needs another worker."""
    sections = config.model_dump(mode="json", include={"model", "kv", "scheduler", "transfer", "words", "log"})
    policy = {"workers", "min_workers", "max_workers", "roles"}  # changed without a restart
    sections["pool"] = config.pools[pool].model_dump(mode="json", exclude=policy)
    return hashlib.blake2b(json.dumps(sections, sort_keys=True).encode(), digest_size=8).hexdigest()

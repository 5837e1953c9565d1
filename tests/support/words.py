"""Builders for the words plane: identities and the two sides of a handshake."""

from __future__ import annotations

from uuid import uuid4

from cluster.handshake import Agreement, DialerHandshake, ListenerHandshake
from cluster.protos import worker_pb2 as pb

SECRET = b"a cluster secret for tests"


def identity(
    name: str = "decode-0", *, kind: pb.PeerKind = pb.WORKER, incarnation: str = "", compatibility_hash: bytes = b""
) -> pb.Identity:
    """A peer with one rank; a fresh incarnation unless given."""
    return pb.Identity(
        kind=kind,
        name=name,
        incarnation=incarnation or uuid4().hex,
        compatibility_hash=compatibility_hash,
        roles=[pb.DECODE],
        ranks=[pb.RankInfo(tp_size=1)],
    )


def shake(dialer: DialerHandshake, listener: ListenerHandshake) -> tuple[Agreement, Agreement]:
    """Runs a handshake to its end; raises what either side refuses."""
    challenge = listener.receive(dialer.hello())
    proof = dialer.receive(challenge)
    assert proof is not None
    assert dialer.receive(listener.receive(proof)) is None
    assert dialer.agreement is not None and listener.agreement is not None
    return dialer.agreement, listener.agreement

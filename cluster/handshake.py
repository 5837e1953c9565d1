"""The first four frames of a Session, as two pure state machines over wire bytes: no gRPC, no clock, no thread.

    dialer                                  listener
    Hello      identity, protocols, epoch, nonce  ->
                <-  Challenge   identity, protocol, nonce, proof
    Proof                                         ->
                <-  Ready       epoch, bulk token          (or Refused, from either side, at any point)

A proof is HMAC-SHA256(cluster secret, role | every byte said so far, both directions), so a byte changed on the
way makes one side refuse. The bulk token is derived the same way: both sides know it, Ready repeats it, and the
Bulk stream of the session presents it. A listener admits rising epochs only: a recorded handshake fails twice,
by the listener's fresh nonce and by its epoch.

Each machine belongs to one stream and one thread. What it refuses is raised as `cluster.errors.Refused`;
`refusal` makes the frame that tells the peer.
"""

from __future__ import annotations

import hmac
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from cluster.errors import ConfigError, Refused
from cluster.protos import PROTOCOL_MAX, PROTOCOL_MIN
from cluster.protos import worker_pb2 as pb

NONCE_BYTES: Final = 32
PROOF_BYTES: Final = 32
MAX_REMEMBERED_EPOCHS: Final = 4096
_BLANK_PROOF: Final = bytes(PROOF_BYTES)


class ProtocolRange(NamedTuple):
    """Protocol versions that a process speaks, both ends included."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}–{self.high}"


PROTOCOLS: Final = ProtocolRange(PROTOCOL_MIN, PROTOCOL_MAX)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a finished handshake established. `peer` has proved that it holds the cluster secret."""

    peer: pb.Identity
    protocol: int
    epoch: int
    bulk_token: bytes


class EpochBook:
    """The last epoch admitted per incarnation; of one listener, on its thread.

    Bounded: the incarnations longest unheard of are forgotten. Their recorded handshakes still fail, by the nonce.
    """

    def __init__(self, max_incarnations: int = MAX_REMEMBERED_EPOCHS) -> None:
        self._last: OrderedDict[str, int] = OrderedDict()
        self._max_incarnations = max_incarnations

    def admit(self, incarnation: str, epoch: int) -> None:
        """Raises Refused unless `epoch` is above every epoch admitted before."""
        last = self._last.get(incarnation, 0)
        if epoch <= last:
            raise Refused(
                pb.UNAUTHENTICATED,
                f"epoch {epoch} of incarnation {incarnation} is not above {last}, the last one seen: "
                "a replayed handshake, or two dialers that share one incarnation",
            )
        self._last[incarnation] = epoch
        self._last.move_to_end(incarnation)
        if len(self._last) > self._max_incarnations:
            self._last.popitem(last=False)


class _Stage(Enum):
    """hello -> challenge -> proof -> ready, named by the frame that is awaited; a refusal ends in CLOSED."""

    HELLO = "hello"
    CHALLENGE = "challenge"
    PROOF = "proof"
    READY = "ready"
    CLOSED = "closed"


class _Machine:
    """What both sides share: the transcript and the parsing of the awaited frame."""

    def __init__(self, secret: bytes, stage: _Stage) -> None:
        if not secret:
            raise ConfigError("secret", "the cluster secret is empty; set the same non-empty one on every host")
        self.agreement: Agreement | None = None
        self._secret = secret
        self._stage = stage
        self._transcript: list[bytes] = []

    def _await(self, wire: bytes) -> pb.Frame:
        """The frame of the awaited kind; anything else closes the machine and raises Refused."""
        awaited, self._stage = self._stage, _Stage.CLOSED  # reopened by the caller when all is well
        if awaited is _Stage.CLOSED:
            raise Refused(pb.INVALID, "the handshake is over")
        try:
            frame = pb.Frame.FromString(wire)
        except DecodeError:
            raise Refused(pb.INVALID, f"{len(wire)} bytes are no frame; awaited {awaited.value}") from None
        kind = frame.WhichOneof("kind")
        if kind == "refused":
            raise Refused(frame.refused.code, f"refused by the peer: {frame.refused.message}")
        if kind != awaited.value:
            raise Refused(pb.INVALID, f"awaited {awaited.value} in the handshake, got {kind or 'an unknown frame'}")
        return frame

    def _mac(self, role: bytes, *more: bytes) -> bytes:
        digest = hmac.new(self._secret, b"sluice.v1 " + role, "sha256")
        for message in (
            *self._transcript,
            *more,
        ):  # length-prefixed: no two transcripts differ only in where they split
            digest.update(len(message).to_bytes(8, "little"))
            digest.update(message)
        return digest.digest()


class DialerHandshake(_Machine):
    """The side that opens the stream.

    `expected_incarnation`: who should answer at this address; "" takes anyone who holds the secret.
    `nonce` is drawn unless given (tests).
    """

    def __init__(
        self,
        identity: pb.Identity,
        secret: bytes,
        epoch: int,
        *,
        expected_incarnation: str = "",
        protocols: ProtocolRange = PROTOCOLS,
        nonce: bytes | None = None,
    ) -> None:
        super().__init__(secret, _Stage.CHALLENGE)
        assert epoch > 0, epoch
        self._identity = identity
        self._epoch = epoch
        self._expected_incarnation = expected_incarnation
        self._protocols = protocols
        self._peer = pb.Identity()
        self._protocol = 0
        hello = pb.Hello(
            identity=identity,
            protocol_min=protocols.low,
            protocol_max=protocols.high,
            epoch=epoch,
            nonce=nonce or secrets.token_bytes(NONCE_BYTES),
        )
        self._transcript.append(pb.Frame(hello=hello).SerializeToString())

    def hello(self) -> bytes:
        """The first frame of the stream."""
        return self._transcript[0]

    def receive(self, wire: bytes) -> bytes | None:
        """The frame to answer with; None once `agreement` is reached. Raises Refused."""
        if self._stage is _Stage.READY:
            self._finish(self._await(wire).ready)
            return None
        challenge = self._await(wire).challenge
        blank = _blanked(wire, challenge.proof)
        if blank is None or not hmac.compare_digest(self._mac(b"listener", blank), challenge.proof):
            raise Refused(
                pb.UNAUTHENTICATED,
                f"{_name(challenge.identity)} did not prove that it holds this cluster's secret; "
                "set the same secret on both hosts",
            )
        if not self._protocols.low <= challenge.protocol <= self._protocols.high:
            raise Refused(pb.INCOMPATIBLE, f"protocol {challenge.protocol} was never offered, only {self._protocols}")
        _check_identity(challenge.identity)
        self._check_incarnation(challenge.identity)
        _check_compatible(self._identity, challenge.identity)
        self._peer, self._protocol = challenge.identity, challenge.protocol
        self._transcript.append(wire)
        proof = pb.Frame(proof=pb.Proof(proof=self._mac(b"dialer"))).SerializeToString()
        self._transcript.append(proof)
        self._stage = _Stage.READY
        return proof

    def _finish(self, ready: pb.Ready) -> None:
        if ready.epoch != self._epoch or not hmac.compare_digest(ready.bulk_token, self._mac(b"bulk")):
            raise Refused(pb.UNAUTHENTICATED, f"{_name(self._peer)} confirmed another handshake than this one")
        self.agreement = Agreement(self._peer, self._protocol, self._epoch, ready.bulk_token)

    def _check_incarnation(self, peer: pb.Identity) -> None:
        if self._expected_incarnation and peer.incarnation != self._expected_incarnation:
            raise Refused(
                pb.PEER_LOST,
                f"{_name(peer)} answers as incarnation {peer.incarnation}, expected {self._expected_incarnation}: "
                "it was restarted, or the address belongs to another worker now",
            )


class ListenerHandshake(_Machine):
    """The side that accepted the stream. `epochs` is shared by all handshakes of one listener."""

    def __init__(
        self,
        identity: pb.Identity,
        secret: bytes,
        epochs: EpochBook,
        *,
        protocols: ProtocolRange = PROTOCOLS,
        nonce: bytes | None = None,
    ) -> None:
        super().__init__(secret, _Stage.HELLO)
        self._identity = identity
        self._epochs = epochs
        self._protocols = protocols
        self._nonce = nonce or secrets.token_bytes(NONCE_BYTES)
        self._hello = pb.Hello()
        self._protocol = 0

    def receive(self, wire: bytes) -> bytes:
        """The frame to answer with; `agreement` is set with the second. Raises Refused."""
        if self._stage is _Stage.PROOF:
            return self._admit(wire)
        hello = self._await(wire).hello
        _check_identity(hello.identity)
        if len(hello.nonce) != NONCE_BYTES or hello.epoch == 0:
            raise Refused(
                pb.INVALID, f"a nonce of {len(hello.nonce)} bytes and epoch {hello.epoch}; needed {NONCE_BYTES} and > 0"
            )
        self._hello, self._protocol = hello, _common_protocol(hello, self._protocols)
        self._transcript.append(wire)
        challenge = pb.Challenge(
            identity=self._identity, protocol=self._protocol, nonce=self._nonce, proof=_BLANK_PROOF
        )
        blank = pb.Frame(challenge=challenge).SerializeToString()
        challenge.proof = self._mac(b"listener", blank)
        sent = pb.Frame(challenge=challenge).SerializeToString()
        self._transcript.append(sent)
        self._stage = _Stage.PROOF
        return sent

    def _admit(self, wire: bytes) -> bytes:
        proof = self._await(wire).proof
        peer = self._hello.identity
        if not hmac.compare_digest(self._mac(b"dialer"), proof.proof):
            raise Refused(
                pb.UNAUTHENTICATED,
                f"{_name(peer)} did not prove that it holds this cluster's secret; set the same secret on both hosts",
            )
        _check_compatible(peer, self._identity)
        self._epochs.admit(peer.incarnation, self._hello.epoch)
        self._transcript.append(wire)
        token = self._mac(b"bulk")
        self.agreement = Agreement(peer, self._protocol, self._hello.epoch, token)
        return pb.Frame(ready=pb.Ready(epoch=self._hello.epoch, bulk_token=token)).SerializeToString()


def refusal(error: Refused) -> bytes:
    """The frame that tells the peer why."""
    return pb.Frame(refused=pb.Refused(code=error.code, message=str(error))).SerializeToString()


def _blanked(wire: bytes, proof: bytes) -> bytes | None:
    """`wire` with its proof zeroed: the very bytes the proof was made over, whatever the encoder did."""
    if len(proof) != PROOF_BYTES or wire.count(proof) != 1:
        return None
    return wire.replace(proof, _BLANK_PROOF)


def _common_protocol(hello: pb.Hello, ours: ProtocolRange) -> int:
    theirs = ProtocolRange(hello.protocol_min, hello.protocol_max)
    highest = min(theirs.high, ours.high)
    if highest < max(theirs.low, ours.low) or theirs.low > theirs.high:
        raise Refused(
            pb.INCOMPATIBLE,
            f"no common protocol: the dialer {_name(hello.identity)} speaks {theirs}, the listener {ours}; "
            "upgrade the older one",
        )
    return highest


def _check_identity(identity: pb.Identity) -> None:
    if not identity.name or not identity.incarnation:
        raise Refused(pb.INVALID, f"name {identity.name!r} and incarnation {identity.incarnation!r} must not be empty")


def _check_compatible(dialer: pb.Identity, listener: pb.Identity) -> None:
    """Peers that exchange KV must agree on what it means; one without a hash exchanges none."""
    theirs, ours = dialer.compatibility_hash, listener.compatibility_hash
    if theirs and ours and not hmac.compare_digest(theirs, ours):
        raise Refused(
            pb.INCOMPATIBLE,
            f"compatibility hashes differ: {_name(dialer)} has {theirs.hex()}, {_name(listener)} has {ours.hex()}; "
            "both must run the same weights, dtype, block size and layout version",
        )


def _name(identity: pb.Identity) -> str:
    return identity.name or "a peer without a name"

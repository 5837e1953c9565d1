from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError, Refused
from cluster.handshake import DialerHandshake, EpochBook, ListenerHandshake, ProtocolRange, refusal
from cluster.protos import worker_pb2 as pb
from tests.support.words import SECRET, identity, shake

INGRESS = identity("ingress-1", kind=pb.INGRESS, incarnation="a" * 32)
DECODE = identity("decode-0", incarnation="b" * 32, compatibility_hash=bytes(range(16)))
PREFILL = identity("prefill-0", incarnation="c" * 32, compatibility_hash=bytes(range(16)))

ranges = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda pair: ProtocolRange(min(pair), max(pair)))
secrets = st.binary(min_size=1, max_size=40)
names = st.text(min_size=1, max_size=20)
identities = st.builds(
    pb.Identity,
    kind=st.sampled_from([pb.INGRESS, pb.WORKER, pb.TOOL]),
    name=names,
    incarnation=names,
    roles=st.lists(st.sampled_from([pb.PREFILL, pb.DECODE]), max_size=2),
    compatibility_hash=st.sampled_from([b"", bytes(range(16))]),
)


def pair(
    dialer: pb.Identity = DECODE,
    listener: pb.Identity = PREFILL,
    *,
    epoch: int = 1,
    epochs: EpochBook | None = None,
    secret: bytes = SECRET,
    listener_secret: bytes = SECRET,
    expected: str = "",
) -> tuple[DialerHandshake, ListenerHandshake]:
    return (
        DialerHandshake(dialer, secret, epoch, expected_incarnation=expected),
        ListenerHandshake(listener, listener_secret, epochs or EpochBook()),
    )


@given(identities, identities, secrets, ranges, ranges, st.integers(1, 2**64 - 1))
def test_valid_peers_meet_at_the_highest_common_protocol_or_learn_both_ranges(
    dialer_identity: pb.Identity,
    listener_identity: pb.Identity,
    secret: bytes,
    ours: ProtocolRange,
    theirs: ProtocolRange,
    epoch: int,
) -> None:
    dialer = DialerHandshake(
        dialer_identity, secret, epoch, protocols=ours, expected_incarnation=listener_identity.incarnation
    )
    listener = ListenerHandshake(listener_identity, secret, EpochBook(), protocols=theirs)
    common = set(range(ours.low, ours.high + 1)) & set(range(theirs.low, theirs.high + 1))
    if not common:
        with pytest.raises(Refused, match=f"speaks {ours}, the listener {theirs}") as refused:
            shake(dialer, listener)
        assert refused.value.code == pb.INCOMPATIBLE
        return
    dialed, accepted = shake(dialer, listener)
    assert dialed.peer == listener_identity and accepted.peer == dialer_identity
    assert dialed.protocol == accepted.protocol == max(common)
    assert dialed.epoch == accepted.epoch == epoch
    assert dialed.bulk_token == accepted.bulk_token and len(dialed.bulk_token) == 32


@given(st.integers(0, 3), st.data())
def test_any_changed_byte_of_any_message_is_refused(which: int, data: st.DataObject) -> None:
    dialer, listener = pair()
    sent = 0

    def carry(wire: bytes) -> bytes:
        nonlocal sent
        sent += 1
        if sent - 1 != which:
            return wire
        at = data.draw(st.integers(0, len(wire) - 1))
        flip = data.draw(st.integers(1, 255))
        return wire[:at] + bytes([wire[at] ^ flip]) + wire[at + 1 :]

    with pytest.raises(Refused):
        challenge = listener.receive(carry(dialer.hello()))
        proof = dialer.receive(carry(challenge))
        assert proof is not None
        dialer.receive(carry(listener.receive(carry(proof))))
    assert dialer.agreement is None
    assert listener.agreement is None or which == 3  # Ready is the listener's last word


@given(st.integers(0, 3), st.binary(max_size=80))
def test_garbage_instead_of_any_message_is_refused(which: int, garbage: bytes) -> None:
    dialer, listener = pair()
    with pytest.raises(Refused):
        challenge = listener.receive(garbage if which == 0 else dialer.hello())
        proof = dialer.receive(garbage if which == 1 else challenge)
        assert proof is not None
        ready = listener.receive(garbage if which == 2 else proof)
        dialer.receive(garbage if which == 3 else ready)
    assert dialer.agreement is None


@given(secrets, secrets)
def test_another_secret_is_refused_by_the_dialer_first(one: bytes, other: bytes) -> None:
    dialer, listener = pair(secret=one, listener_secret=other)
    if one == other:
        shake(dialer, listener)
        return
    with pytest.raises(Refused, match="set the same secret") as refused:
        shake(dialer, listener)
    assert refused.value.code == pb.UNAUTHENTICATED


def test_a_dialer_that_does_not_check_is_refused_by_the_listener() -> None:
    dialer, listener = pair(secret=b"wrong")
    listener.receive(dialer.hello())
    forged = pb.Frame(proof=pb.Proof(proof=bytes(32))).SerializeToString()
    with pytest.raises(Refused, match="decode-0 did not prove"):
        listener.receive(forged)


def test_the_listeners_own_proof_cannot_be_reflected() -> None:
    dialer, listener = pair()
    challenge = pb.Frame.FromString(listener.receive(dialer.hello())).challenge
    with pytest.raises(Refused, match="did not prove"):
        listener.receive(pb.Frame(proof=pb.Proof(proof=challenge.proof)).SerializeToString())


def test_a_recorded_handshake_cannot_be_replayed() -> None:
    epochs = EpochBook()
    dialer, listener = pair(epochs=epochs)
    hello = dialer.hello()
    proof = dialer.receive(listener.receive(hello))
    assert proof is not None
    listener.receive(proof)

    replayed = ListenerHandshake(PREFILL, SECRET, epochs)
    replayed.receive(hello)
    with pytest.raises(Refused, match="did not prove"):  # another nonce of the listener
        replayed.receive(proof)

    # Even a listener that drew the same nonce again refuses the epoch.
    nonce = bytes(range(32))
    dialer, listener = DialerHandshake(DECODE, SECRET, 7), ListenerHandshake(PREFILL, SECRET, epochs, nonce=nonce)
    hello, proof = dialer.hello(), dialer.receive(listener.receive(dialer.hello()))
    assert proof is not None
    listener.receive(proof)
    replayed = ListenerHandshake(PREFILL, SECRET, epochs, nonce=nonce)
    replayed.receive(hello)
    with pytest.raises(Refused, match=r"epoch 7 of incarnation b+ is not above 7"):
        replayed.receive(proof)


def test_epochs_rise_per_incarnation_and_are_burnt_only_by_those_who_hold_the_secret() -> None:
    epochs = EpochBook()
    shake(*pair(epoch=5, epochs=epochs))
    with pytest.raises(Refused):
        shake(*pair(epoch=9, epochs=epochs, secret=b"wrong"))
    shake(*pair(epoch=6, epochs=epochs))
    with pytest.raises(Refused, match="is not above 6"):
        shake(*pair(epoch=6, epochs=epochs))
    shake(*pair(INGRESS, epoch=1, epochs=epochs))


def test_the_book_of_epochs_forgets_the_incarnations_longest_unheard_of() -> None:
    epochs = EpochBook(max_incarnations=2)
    for incarnation in ("a", "b", "a2"):
        epochs.admit(incarnation, 3)
    epochs.admit("a", 1)
    with pytest.raises(Refused):
        epochs.admit("a2", 3)


def test_compatibility_hashes_are_compared_when_both_have_one() -> None:
    other = identity("prefill-9", compatibility_hash=bytes(16))
    with pytest.raises(Refused, match=f"decode-0 has {bytes(range(16)).hex()}, prefill-9 has {bytes(16).hex()}") as one:
        shake(*pair(DECODE, other))
    assert one.value.code == pb.INCOMPATIBLE
    shake(*pair(INGRESS, other))


def test_the_listener_compares_compatibility_hashes_too() -> None:
    """A dialer that would not mind is refused all the same."""
    careless = DialerHandshake(identity("decode-0", compatibility_hash=b""), SECRET, 1)
    hello = pb.Frame.FromString(careless.hello())
    hello.hello.identity.compatibility_hash = bytes(16)
    listener = ListenerHandshake(PREFILL, SECRET, EpochBook())
    wire = hello.SerializeToString()
    careless._transcript[0] = wire
    proof = careless.receive(listener.receive(wire))
    assert proof is not None
    with pytest.raises(Refused, match="compatibility hashes differ"):
        listener.receive(proof)


def test_another_incarnation_than_the_expected_one_is_refused() -> None:
    with pytest.raises(Refused, match=r"answers as incarnation c+, expected d+: it was restarted") as refused:
        shake(*pair(expected="d" * 32))
    assert refused.value.code == pb.PEER_LOST
    shake(*pair(expected=PREFILL.incarnation))


def test_a_refusal_reaches_the_other_side_with_code_and_reason() -> None:
    dialer, listener = pair()
    wire = refusal(Refused(pb.NO_WORKER, "the engine is stuck"))
    with pytest.raises(Refused, match="refused by the peer: the engine is stuck") as refused:
        dialer.receive(wire)
    assert refused.value.code == pb.NO_WORKER
    listener.receive(pair()[0].hello())
    with pytest.raises(Refused, match="refused by the peer"):
        listener.receive(wire)


def test_a_machine_that_refused_stays_closed() -> None:
    dialer, listener = pair()
    with pytest.raises(Refused, match="awaited hello in the handshake, got submit"):
        listener.receive(pb.Frame(submit=pb.Submit()).SerializeToString())
    with pytest.raises(Refused, match="the handshake is over"):
        listener.receive(dialer.hello())


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        (pb.Hello(identity=DECODE, protocol_min=1, protocol_max=1, epoch=1, nonce=b"short"), "a nonce of 5 bytes"),
        (pb.Hello(identity=DECODE, protocol_min=1, protocol_max=1, epoch=0, nonce=bytes(32)), "epoch 0"),
        (pb.Hello(identity=DECODE, protocol_min=2, protocol_max=1, epoch=1, nonce=bytes(32)), "speaks 2–1"),
        (pb.Hello(protocol_min=1, protocol_max=1, epoch=1, nonce=bytes(32)), "must not be empty"),
    ],
)
def test_a_hello_that_makes_no_sense_is_refused(hello: pb.Hello, message: str) -> None:
    with pytest.raises(Refused, match=message):
        ListenerHandshake(PREFILL, SECRET, EpochBook()).receive(pb.Frame(hello=hello).SerializeToString())


def test_an_empty_secret_is_an_error_of_the_config() -> None:
    with pytest.raises(ConfigError, match="cluster secret is empty"):
        DialerHandshake(DECODE, b"", 1)

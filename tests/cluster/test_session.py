"""What a session makes of peers that misbehave, with plain gRPC clients on real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import pytest

from cluster import session as session_module
from cluster.handshake import DialerHandshake
from cluster.heart import no_engine
from cluster.parts import MAX_FRAME_BYTES
from cluster.protos import BULK_PATH, SESSION_PATH
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.rpc import Dialer, WordsServer, WordsThread
from cluster.streams import open_stream
from cluster.tls import open_channel
from tests.support.words import (
    SECRET,
    Echo,
    Pair,
    Recorder,
    identity,
    open_pair,
    raw_stream,
    submit,
    tokens,
    words_config,
)

INGRESS = identity("ingress-1", kind=pb.INGRESS)
KEY = RequestKey("r", 0)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with WordsThread(config=words_config()) as words:
        yield open_pair(words)


LARGE_PART = pb.Frame(part=pb.Part(key=KEY.wire(), index=1, payload=b"x"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xff\xff", "3 bytes are no frame"),
        (bytes(MAX_FRAME_BYTES + 8192), f"a frame of {MAX_FRAME_BYTES + 8192} bytes"),
        (bytes(2 << 20), ""),  # gRPC itself ends it
        (pb.Frame(hello=pb.Hello()).SerializeToString(), "a hello frame after the handshake"),
        (LARGE_PART.SerializeToString(), "part 1 of a message of request 'r', expected 0"),
        (pb.Frame(part=pb.Part(key=KEY.wire(), last=True, payload=b"\xff")).SerializeToString(), "are no frame"),
        (
            pb.Frame(
                part=pb.Part(key=KEY.wire(), last=True, payload=LARGE_PART.SerializeToString())
            ).SerializeToString(),
            "a part frame inside of parts",
        ),
        (submit("i" * 2000).SerializeToString(), "a request id of 2000 characters"),
    ],
)
def test_what_a_peer_must_not_send_ends_its_session_only(pair: Pair, data: bytes, message: str) -> None:
    with raw_stream(pair.address) as raw:
        raw.shake(INGRESS)
        raw.write(data)
        status, details = raw.end()
    assert status != grpc.StatusCode.OK and message in details
    broken = pair.at_worker.wait("broken")
    assert broken.session.peer.name == "ingress-1" and message in str(broken.error)
    assert broken.error is not None and broken.error.reason == ("mistake" if message else "gone")
    pair.dialed.send(submit())
    assert pair.at_ingress.wait_tokens(3) == [1, 2, 3] and pair.at_worker.count("broken") == 1


@pytest.mark.parametrize("data", [b"", b"\xff\xff", submit().SerializeToString(), bytes(80_000)])
def test_what_is_no_hello_is_refused(pair: Pair, data: bytes) -> None:
    with raw_stream(pair.address) as raw:
        raw.write(data)
        assert raw.read_kind("refused").refused.code == pb.INVALID
        assert raw.end()[0] == grpc.StatusCode.OK
    assert pair.at_worker.count("open") == 1 and pair.dialed.open


def test_a_recorded_handshake_is_refused(pair: Pair) -> None:
    handshake = DialerHandshake(INGRESS, SECRET, 1)
    with raw_stream(pair.address) as raw:
        raw.write(handshake.hello())
        proof = handshake.receive(raw.read())
        assert proof is not None
        raw.write(proof)
        raw.read_kind("ready")
    with raw_stream(pair.address) as replay:
        replay.write(handshake.hello())
        replay.write(proof)
        assert replay.read_kind("refused").refused.code == pb.UNAUTHENTICATED
    assert pair.at_worker.count("open") == 2


def test_a_silent_stranger_is_let_go() -> None:
    with WordsThread(config=words_config(connect_timeout_s=0.2)) as words:
        address = WordsServer(words, identity(), SECRET, Recorder()).start()
        with raw_stream(address) as raw:
            assert raw.end() == (grpc.StatusCode.DEADLINE_EXCEEDED, "the handshake took too long")


def test_unknown_frame_kinds_are_answered_unsupported(pair: Pair) -> None:
    with raw_stream(pair.address) as raw:
        raw.shake(INGRESS)
        raw.write(b"\xca\x3e\x00")  # field 1001, a message
        assert raw.read_kind("unsupported").unsupported.field_number == 1001
        raw.write(b"")
        assert raw.read_kind("unsupported").unsupported.field_number == 0
        raw.write(submit("r", 2).SerializeToString())
        assert raw.read_kind("step_tokens").step_tokens.sequences[0].token_ids[0] == 1


def test_a_bulk_stream_needs_the_token_of_its_session(pair: Pair) -> None:
    with raw_stream(pair.address) as raw, raw_stream(pair.address, BULK_PATH) as bulk:
        agreement = raw.shake(INGRESS)
        bulk.write(pb.BulkFrame(incarnation=INGRESS.incarnation, epoch=1, token=bytes(32)).SerializeToString())
        assert bulk.end() == (grpc.StatusCode.UNAUTHENTICATED, "no open session has this bulk token")
        with raw_stream(pair.address, BULK_PATH) as right, raw_stream(pair.address, BULK_PATH) as second:
            hello = pb.BulkFrame(incarnation=INGRESS.incarnation, epoch=1, token=agreement.bulk_token)
            right.write(hello.SerializeToString())
            right.write(pb.BulkFrame(topic="t", payload=b"p", last=True).SerializeToString())
            assert pair.at_worker.wait("bulk").payload == b"p"
            second.write(hello.SerializeToString())
            assert second.end()[0] == grpc.StatusCode.UNAUTHENTICATED
            right.write(b"\xff")
            assert "no BulkFrame" in right.end()[1] and "no BulkFrame" in raw.end()[1]
    assert pair.at_worker.count("broken") == 1 and pair.dialed.open


async def _finish_before_bulk_is_opened(address: str, payload: bytes) -> None:
    """On one connection, so that the listener reads the end of the Session stream first. Returns when it has ended
    the Bulk stream."""
    handshake = DialerHandshake(INGRESS, SECRET, 1)
    async with open_channel(address, None) as channel:
        session = open_stream(channel, SESSION_PATH)
        await session.write(handshake.hello())
        while handshake.agreement is None:
            data = await session.read()
            assert isinstance(data, bytes)
            if (reply := handshake.receive(data)) is not None:
                await session.write(reply)
        await session.done_writing()
        bulk = open_stream(channel, BULK_PATH)
        hello = pb.BulkFrame(incarnation=INGRESS.incarnation, epoch=1, token=handshake.agreement.bulk_token)
        for frame in (hello, pb.BulkFrame(topic="late", payload=payload, last=True)):
            await bulk.write(frame.SerializeToString())
        await bulk.done_writing()
        with pytest.raises(grpc.RpcError, match="closed its stream"):
            await bulk.read()


def test_bulk_that_is_opened_after_its_session_was_ended_well_still_arrives(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_FINISH_GRACE_S", 3600.0)  # both ends were read: nothing else is awaited
    asyncio.run(_finish_before_bulk_is_opened(pair.address, b"p"))
    pair.at_worker.wait("broken")
    told = [event for event in pair.at_worker.events if event.session.peer.name == "ingress-1"]
    assert [(event.kind, event.payload) for event in told] == [("open", b""), ("bulk", b"p"), ("broken", b"")]


def test_a_peer_that_never_opens_bulk_ends_its_session_all_the_same(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_FINISH_GRACE_S", 3600.0)  # who dies ends it at once
    with raw_stream(pair.address) as dies:
        dies.shake(INGRESS, epoch=1)
    assert "its process ended" in str(pair.at_worker.wait("broken").error)
    monkeypatch.setattr(session_module, "_FINISH_GRACE_S", 0.05)
    with raw_stream(pair.address) as finishes:
        finishes.shake(INGRESS, epoch=2)
        finishes.done_writing()
        assert finishes.end() == (grpc.StatusCode.ABORTED, "ingress-1 closed its stream")
    assert str(pair.at_worker.wait("broken", 2).error) == "ingress-1 closed its stream"
    assert pair.server.sessions() == [pair.accepted] and pair.dialed.open


def test_who_dials_again_ends_its_older_session(pair: Pair) -> None:
    with raw_stream(pair.address) as first, raw_stream(pair.address) as second:
        first.shake(INGRESS, epoch=1)
        second.shake(INGRESS, epoch=2)
        assert "dialed again (epoch 2)" in first.end()[1]
        assert "dialed again (epoch 2)" in str(pair.at_worker.wait("broken").error)
        second.write(submit("r", 1).SerializeToString())
        second.read_kind("step_tokens")
    assert pair.at_worker.count("open") == 3


def test_a_reader_that_stalls_loses_its_requests_and_delays_nobody() -> None:
    config = words_config(heartbeat_timeout_s=60.0, outbox_max_bytes=1 << 20, outbox_max_request_bytes=1 << 18)
    with WordsThread(no_engine, config) as words:
        at_worker, at_ingress, worker = Echo(), Recorder(), identity()
        address = WordsServer(words, worker, SECRET, at_worker).start()
        with raw_stream(address) as stalled:
            stalled.shake(INGRESS)  # and reads no more
            to_stalled = at_worker.wait("open").session
            Dialer(words, identity("ingress-0"), SECRET, at_ingress).keep(address)
            to_reader = at_worker.wait("open", 2).session
            num_sent = 0
            while not at_worker.count("overflow"):
                assert num_sent < 3000
                to_stalled.send(submit("for the stalled", 15_000))  # 45 kB
                to_reader.send_tokens(num_sent, [tokens(KEY, num_sent, num_sent)])
                num_sent += 1
                at_ingress.wait_tokens(num_sent)  # the reader gets each one, whatever waits for the other
            overflow = at_worker.wait("overflow")
            assert overflow.session is to_stalled and overflow.key == RequestKey("for the stalled", 0)
            assert at_ingress.tokens() == list(range(num_sent))
            assert to_stalled.open and to_reader.open
            to_stalled.send(submit("another", 1))  # the session goes on for others
            assert stalled.read_kind("submit")

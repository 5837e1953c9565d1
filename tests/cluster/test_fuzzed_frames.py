"""Whatever a peer sends: its session ends as a session does, or goes on; never anything else. Seeded, many cases."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import Refused, SessionError
from cluster.handshake import Agreement, DialerHandshake, EpochBook, ListenerHandshake
from cluster.heart import Heart, no_engine
from cluster.parts import (
    MAX_BULK_MESSAGE_BYTES,
    MAX_FRAME_BYTES,
    MAX_OPEN_BYTES,
    MAX_REQUEST_ID_BYTES,
    BulkAssembler,
    frame_key,
)
from cluster.protos import worker_pb2 as pb
from cluster.session import Session
from cluster.words_thread import WordsThread
from tests.fuzz import frames
from tests.support.words import SECRET, Recorder, identity, open_pair, raw_stream, submit, words_config

MESSAGES = 25  # of one session
SESSION_KINDS = {"open", "frame", "broken"}


class Wire:
    """A stream that has said what it will say; then it ends, with what is no bytes. Takes whatever is written."""

    def __init__(self, messages: list[bytes]) -> None:
        self._messages = messages[::-1]
        self.num_read = 0
        self.written: list[bytes] = []

    async def read(self) -> object:
        self.num_read += bool(self._messages)
        return self._messages.pop() if self._messages else None

    async def write(self, message: bytes, /) -> None:
        self.written.append(message)


async def one_session(messages: list[bytes], heart: Heart) -> tuple[Session, Recorder, int]:
    """From its opening to its end, which its streams' end is if nothing else was; how many messages it took. Its Bulk
    stream brings nothing."""
    handler, wire = Recorder(), Wire(messages)
    agreement = Agreement(identity("fuzzer"), 1, 1, b"t" * 32)
    session = Session(agreement, handler, heart, words_config(), dialed=False, on_end=lambda _: None)
    session.begin()
    await asyncio.gather(session.carry(wire), session.carry_bulk(Wire([])))
    return session, handler, wire.num_read


def check(session: Session, handler: Recorder) -> None:
    error = session.error
    assert isinstance(error, SessionError) and error.reason in ("mistake", "gone"), repr(error)
    kinds = Counter(event.kind for event in handler.events)
    assert kinds["open"] == kinds["broken"] == 1 and set(kinds) <= SESSION_KINDS
    assert handler.events[-1].kind == "broken"
    assert "internal error" not in str(error)
    assert session._assembler.num_bytes <= MAX_OPEN_BYTES
    for event in handler.events:
        if event.kind == "frame":
            kind = event.frame.WhichOneof("kind")
            assert kind not in (None, "hello", "challenge", "proof", "ready", "refused", "heartbeat", "part")
            key = frame_key(event.frame)
            assert key is None or len(key.request_id.encode()) <= MAX_REQUEST_ID_BYTES


def sessions_of(seeds: range) -> Counter[str]:
    """How they ended, and how many messages they took; raises if anything but a session's end came of one."""
    ends: Counter[str] = Counter()

    async def run() -> None:
        strays: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: strays.append(context))
        heart = Heart(no_engine)
        for seed in seeds:
            made = frames.session(Random(seed), MESSAGES)
            session, handler, num_messages = await one_session(made, heart)
            check(session, handler)
            assert session.error is not None
            ends[session.error.reason] += 1
            ends["messages"] += num_messages
        assert strays == []

    asyncio.run(run())
    return ends


def test_a_session_bears_any_message() -> None:
    """Each ends by a mistake or, without one, with its stream."""
    ends = sessions_of(range(700))
    assert ends["mistake"] + ends["gone"] == 700 and min(ends["mistake"], ends["gone"]) > 100
    assert ends["messages"] > 10_000


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**32), min_size=20, max_size=20))
def test_a_session_bears_frames_of_every_kind(seeds: list[int]) -> None:
    """Without mistakes of form the session goes on: 1,000 well formed frames, each told or refused by name."""

    async def run() -> None:
        for seed in seeds:
            made = frames.frame(Random(seed))
            session, handler, _ = await one_session([made.SerializeToString()], Heart(no_engine))
            check(session, handler)
            told = [event.frame for event in handler.events if event.kind == "frame"]
            assert told in ([], [made]) or made != made  # NaN
            kind = made.WhichOneof("kind")
            if made.ByteSize() > MAX_FRAME_BYTES:
                assert not told and f"a frame of {made.ByteSize()} bytes" in str(session.error)
            elif not told and kind not in ("heartbeat", "part"):
                assert "after the handshake" in str(session.error) or "a request id of" in str(session.error), kind

    asyncio.run(run())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_a_handshake_bears_any_message(seed: int) -> None:
    """2,000 against each side, in each of its states: refused, and from then on closed."""
    for number in range(10):
        random = Random(seed + number)
        listener = ListenerHandshake(identity(), SECRET, EpochBook())
        dialer = DialerHandshake(identity("ingress-0", kind=pb.INGRESS), SECRET, 1)
        if random.random() < 0.5:
            challenge = listener.receive(dialer.hello())
            if random.random() < 0.5:
                dialer.receive(challenge)
        data = frames.message(random) if random.random() < 0.7 else frames.damaged(random, dialer.hello())
        for side in (listener, dialer):
            try:
                side.receive(data)
            except Refused:
                with pytest.raises(Refused):
                    side.receive(dialer.hello())
            assert side.agreement is None  # nobody who does not know the secret gets in


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_a_bulk_stream_bears_any_piece(seed: int) -> None:
    """4,000 pieces."""
    random, assembler = Random(seed), BulkAssembler(max_message_bytes=100_000)
    for _ in range(20):
        piece = pb.BulkFrame()
        frames.fill(random, piece, frames.IDS)
        piece.message_id = random.choice((0, 0, 0, 1, 2**64 - 1))
        piece.payload = bytes(random.choice((0, 1, 60_000)))
        try:
            whole = assembler.add(piece)
        except SessionError:
            return
        assert whole is None or len(whole[1]) <= 100_000 <= MAX_BULK_MESSAGE_BYTES


def over_grpc(num_sessions: int, seed: int) -> None:
    """The same over real streams: after each the listener serves another peer as before."""
    with WordsThread(config=words_config(heartbeat_timeout_s=20.0)) as words:
        pair = open_pair(words)
        for number in range(num_sessions):
            random = Random(seed + number)
            with raw_stream(pair.address) as raw:
                if random.random() < 0.8:
                    raw.shake(identity(f"fuzzer-{number}", kind=pb.INGRESS, incarnation=uuid4().hex))
                for _ in range(10):
                    raw.write(frames.message(random))
                raw.write(bytes(2 << 20))  # over what gRPC itself lets in
                raw.end()
        pair.dialed.send(submit(num_tokens=3))
        assert pair.at_ingress.wait_tokens(3)[-3:] == [1, 2, 3]
        assert pair.dialed.open and pair.accepted.open
        opened = pair.at_worker.count("open")
        pair.at_worker.wait("broken", opened - 1)
        pair.at_ingress.wait("open")
        assert pair.at_ingress.count("open") == 1


def test_a_listener_bears_any_message_over_grpc() -> None:
    over_grpc(num_sessions=40, seed=0)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_long_form() -> None:
    """100,000 messages to sessions, 10,000 over gRPC."""
    assert sessions_of(range(1000, 8000))["messages"] > 100_000
    over_grpc(num_sessions=1000, seed=5_000)

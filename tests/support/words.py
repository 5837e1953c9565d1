"""Builders for the words plane: identities, a handler that records, raw clients, and a peer process.

`python -m tests.support.words` is that process: it listens, prints "address incarnation" and answers every Submit
with as many StepTokens frames as the request has prompt tokens, until its stdin ends.
"""

from __future__ import annotations

import queue
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Condition
from typing import NamedTuple
from uuid import uuid4

import grpc

from cluster.errors import SessionError
from cluster.handshake import Agreement, DialerHandshake, ListenerHandshake
from cluster.protos import SESSION_PATH
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.rpc import Dialer, Session, WordsServer, WordsThread
from cluster.words_config import WordsConfig

SECRET = b"a cluster secret for tests"
DEADLINE_S = 20.0


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


def words_config(**changes: object) -> WordsConfig:
    """Heartbeats that are quick to notice, and patient enough for a busy machine."""
    return WordsConfig.model_validate({"heartbeat_s": 0.1, "heartbeat_timeout_s": 1.0, **changes})


def shake(dialer: DialerHandshake, listener: ListenerHandshake) -> tuple[Agreement, Agreement]:
    """Runs a handshake to its end; raises what either side refuses."""
    challenge = listener.receive(dialer.hello())
    proof = dialer.receive(challenge)
    assert proof is not None
    assert dialer.receive(listener.receive(proof)) is None
    assert dialer.agreement is not None and listener.agreement is not None
    return dialer.agreement, listener.agreement


class Event(NamedTuple):
    """One call of a SessionHandler."""

    kind: str  # open, frame, bulk, broken, overflow
    session: Session
    frame: pb.Frame = pb.Frame()
    topic: str = ""
    payload: bytes = b""
    error: SessionError | None = None
    key: RequestKey | None = None


class Recorder:
    """A SessionHandler that keeps every call, in order, and lets tests wait for them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = Condition()

    def _add(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def on_open(self, session: Session) -> None:
        self._add(Event("open", session))

    def on_frame(self, session: Session, frame: pb.Frame) -> None:
        self._add(Event("frame", session, frame=frame))

    def on_bulk(self, session: Session, topic: str, payload: bytes) -> None:
        self._add(Event("bulk", session, topic=topic, payload=payload))

    def on_broken(self, session: Session, error: SessionError) -> None:
        self._add(Event("broken", session, error=error))

    def on_overflow(self, session: Session, key: RequestKey) -> None:
        self._add(Event("overflow", session, key=key))

    def count(self, kind: str) -> int:
        return Counter(event.kind for event in self.events)[kind]

    def wait(self, kind: str, number: int = 1, *, matching: Callable[[Event], bool] = lambda _: True) -> Event:
        """The `number`-th event of a kind; fails if it does not come."""

        def found() -> list[Event]:
            return [event for event in self.events if event.kind == kind and matching(event)]

        with self._changed:
            came = self._changed.wait_for(lambda: len(found()) >= number, DEADLINE_S)
            assert came, f"no {kind} number {number} among {Counter(event.kind for event in self.events)}"
            return found()[number - 1]

    def tokens(self) -> list[int]:
        """All token ids that arrived, in order."""
        frames = [event.frame.step_tokens for event in self.events if event.kind == "frame"]
        return [token for frame in frames for sequence in frame.sequences for token in sequence.token_ids]

    def wait_tokens(self, number: int) -> list[int]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.tokens()) >= number, DEADLINE_S), len(self.tokens())
        return self.tokens()


class Echo(Recorder):
    """Answers a Submit with one token of its request after the other."""

    def on_frame(self, session: Session, frame: pb.Frame) -> None:
        super().on_frame(session, frame)
        for i, token in enumerate(frame.submit.prompt_token_ids):
            session.send_tokens(i, [tokens(RequestKey.of(frame.submit.key), i, token)])


def submit(request_id: str = "r", num_tokens: int = 3) -> pb.Frame:
    key = pb.RequestKey(request_id=request_id)
    return pb.Frame(submit=pb.Submit(key=key, prompt_token_ids=range(1, num_tokens + 1)))


def tokens(key: RequestKey, first: int, *ids: int) -> pb.SequenceTokens:
    return pb.SequenceTokens(key=key.wire(), first_token_index=first, token_ids=ids)


@dataclass
class Pair:
    """A listener and a dialer that has a session with it, on one words thread."""

    words: WordsThread
    server: WordsServer
    address: str
    worker: pb.Identity
    at_worker: Recorder
    dialer: Dialer
    at_ingress: Recorder

    @property
    def accepted(self) -> Session:
        """The listener's end of the first session."""
        return self.at_worker.wait("open").session

    @property
    def dialed(self) -> Session:
        """The dialer's end of the first session."""
        return self.at_ingress.wait("open").session


def open_pair(words: WordsThread) -> Pair:
    at_worker, at_ingress, worker = Echo(), Recorder(), identity()
    server = WordsServer(words, worker, SECRET, at_worker)
    address = server.start()
    dialer = Dialer(words, identity("ingress-0", kind=pb.INGRESS), SECRET, at_ingress)
    dialer.keep(address, worker.incarnation)
    at_ingress.wait("open")
    return Pair(words, server, address, worker, at_worker, dialer, at_ingress)


class RawStream:
    """One stream of raw bytes from a plain gRPC client, which does as it pleases."""

    def __init__(self, address: str, path: str = SESSION_PATH) -> None:
        self._channel = grpc.insecure_channel(address)
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = self._channel.stream_stream(path, None, None)(iter(self._outgoing.get, None), timeout=DEADLINE_S)
        self._frames: Iterator[bytes] = iter(self._call)

    def write(self, data: bytes) -> None:
        self._outgoing.put(data)

    def done_writing(self) -> None:
        """Ends its half of the stream well."""
        self._outgoing.put(None)

    def read(self) -> bytes:
        """The next frame; raises grpc.RpcError, or StopIteration at the end of the stream."""
        return next(self._frames)

    def read_kind(self, kind: str) -> pb.Frame:
        """The next frame of a kind, past heartbeats and others."""
        while True:
            frame = pb.Frame.FromString(self.read())
            if frame.WhichOneof("kind") == kind:
                return frame

    def end(self) -> tuple[grpc.StatusCode, str]:
        """Reads to the end; the status that the listener ended the stream with."""
        with suppress(grpc.RpcError):
            for _ in self._call:
                pass
        return self._call.code(), self._call.details()

    def shake(self, who: pb.Identity, *, epoch: int = 1, secret: bytes = SECRET) -> Agreement:
        handshake = DialerHandshake(who, secret, epoch)
        self.write(handshake.hello())
        while handshake.agreement is None:
            reply = handshake.receive(self.read())
            if reply is not None:
                self.write(reply)
        return handshake.agreement

    def close(self) -> None:
        self.done_writing()
        self._channel.close()


@contextmanager
def raw_stream(address: str, path: str = SESSION_PATH) -> Iterator[RawStream]:
    stream = RawStream(address, path)
    try:
        yield stream
    finally:
        stream.close()


class PeerProcess(NamedTuple):
    process: subprocess.Popen[str]
    address: str
    incarnation: str


@contextmanager
def peer_process() -> Iterator[PeerProcess]:
    """A listener in a process of its own; killed at the end."""
    command = [sys.executable, "-m", "tests.support.words"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address, incarnation = process.stdout.readline().split()
            yield PeerProcess(process, address, incarnation)
        finally:
            process.kill()


def _main() -> None:
    with WordsThread(config=words_config()) as words:
        who = identity()
        address = WordsServer(words, who, SECRET, Echo()).start()
        print(address, who.incarnation, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    _main()

"""One peer, one session: what is sent to it, what arrives from it, and its end, told once.

A session lives on the words thread; `send*` and `close` may be called from any thread and never block. The two
streams are handed in by `cluster.rpc`; here nothing knows who dialed them.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, ParamSpec, Protocol, cast
from uuid import uuid4

from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from cluster.errors import SessionBroken, SessionClosed, SessionError, SessionSilent, SessionStuffed
from cluster.handshake import Agreement
from cluster.heart import Heart, Liveness
from cluster.outbox import Outbox
from cluster.parts import (
    FRAME_SLACK_BYTES,
    MAX_FRAME_BYTES,
    MAX_REQUEST_ID_BYTES,
    Assembler,
    BulkAssembler,
    BulkOutbox,
    frame_key,
)
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.streams import STREAM_ERRORS, DialedStream, Stream, broken, last_word
from cluster.words_config import WordsConfig

MAX_OUTBOX_FRAMES: Final = 16_384
MAX_BULK_OUTBOX_BYTES: Final = 64 << 20
_STATUS_GRACE_S: Final = 0.1
_FINISH_GRACE_S: Final = 1.0
_NUM_STREAMS: Final = 2  # Session and Bulk: every session has both, however late one comes up
_HANDSHAKE: Final = frozenset({"hello", "challenge", "proof", "ready", "refused"})
_NOT_IN_PARTS: Final = _HANDSHAKE | {"part", "heartbeat"}
_log = logging.getLogger(__name__)
P = ParamSpec("P")


class SessionHandler(Protocol):
    """Who uses sessions. Everything is called on the words thread and must not block.

    For each session: `on_open` once, then frames, then `on_broken` once, for whatever reason, `Session.close`
    here included. An exception out of a handler ends that session, never the process.
    """

    def on_open(self, session: Session) -> None: ...

    def on_frame(self, session: Session, frame: pb.Frame) -> None:
        """A frame of any kind but handshake, heartbeat and part; large messages arrive whole."""
        ...

    def on_bulk(self, session: Session, topic: str, payload: bytes) -> None: ...

    def on_broken(self, session: Session, error: SessionError) -> None: ...

    def on_overflow(self, session: Session, key: RequestKey) -> None:
        """The peer reads too slowly: what waited about this request is dropped, and so is what follows, until a
        frame that ends it (Cancel, Release, KvFailed, tokens with a finish reason)."""
        ...


class Session:
    """`id` is unique among all sessions; `peer` has proved that it holds the cluster secret."""

    def __init__(
        self,
        agreement: Agreement,
        handler: SessionHandler,
        heart: Heart,
        config: WordsConfig,
        *,
        dialed: bool,
        on_end: Callable[[Session], None],
    ) -> None:
        self.peer = agreement.peer
        self.epoch = agreement.epoch
        self.protocol = agreement.protocol
        self.dialed = dialed
        self.id = f"{agreement.peer.name}:{agreement.epoch}:{uuid4().hex[:12]}"
        self.num_received = 0  # frames, heartbeats included
        self.num_unsupported = 0  # frames of unknown kinds, answered
        self.bulk_token = agreement.bulk_token
        self._bulk_bound = False
        self._handler = handler
        self._heart = heart
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._liveness = Liveness(
            interval_s=config.heartbeat_s, timeout_s=config.heartbeat_timeout_s, step_timeout_s=config.step_timeout_s
        )
        self._tick_posted = False
        self._wake = asyncio.Event()
        self._outbox = Outbox(
            lambda: self._post(self._wake.set),
            lambda key: self._post(self._overflow, key),
            lambda reason: self._post(self.end, SessionStuffed(reason)),
            max_bytes=config.outbox_max_bytes,
            max_request_bytes=config.outbox_max_request_bytes,
            max_frames=MAX_OUTBOX_FRAMES,
        )
        self._wake_bulk = asyncio.Event()
        self._bulk_outbox = BulkOutbox(lambda: self._post(self._wake_bulk.set), max_bytes=MAX_BULK_OUTBOX_BYTES)
        self._assembler = Assembler()
        self._bulk_assembler = BulkAssembler()
        self.finished = False  # ended of our own will
        self._num_writing = 0
        self._num_carried = 0  # streams
        self._num_read_out = 0  # streams that the peer ended well
        self._opened = False
        self._error: SessionError | None = None
        self._ended = asyncio.Event()

    # ------------------------------------------------------------ from any thread

    @property
    def open(self) -> bool:
        return self._opened and self._error is None

    @property
    def error(self) -> SessionError | None:
        """Why it broke; None while it has not."""
        return self._error

    @property
    def num_queued_frames(self) -> int:
        return self._outbox.num_frames

    @property
    def num_queued_bytes(self) -> int:
        return self._outbox.num_bytes + self._bulk_outbox.num_bytes

    def send(self, frame: pb.Frame, key: RequestKey | None = None) -> None:
        """Queues a frame; over 64 KiB it leaves in parts. `key` is found in the frame where its kind carries one.

        Frames about one request arrive in order. On a broken session nothing happens.
        """
        self._outbox.put(frame, key)

    def send_tokens(self, step: int, sequences: Sequence[pb.SequenceTokens]) -> None:
        """Queues the new tokens of a step, merged with those not yet written. The values are the session's now."""
        self._outbox.put_tokens(step, sequences)

    def send_bulk(self, topic: str, payload: bytes) -> bool:
        """Queues a message for the Bulk stream, after those before it. False: dropped whole, it does not fit."""
        return self._bulk_outbox.put(topic, payload)

    def close(self, reason: str) -> None:
        """Ends the session soon; what is queued is dropped. The handler's `on_broken` tells when."""
        self._post(self.finish, reason)

    def beat(self, frame: bytes) -> None:
        """A tick of our heart: our heartbeat leaves, and the peer's silence is judged on the words thread."""
        self._outbox.put_heartbeat(frame)
        if not self._tick_posted:
            self._tick_posted = True
            self._post(self._tick)

    # ------------------------------------------------------------ on the words thread

    def begin(self) -> None:
        """The handshake is over: from now on the handler hears of it."""
        self._opened = True
        self._heart.add(self)
        self._tell(self._handler.on_open, self)

    def end(self, error: SessionError) -> None:
        """The first call counts: queues are dropped, streams let go, the handler told."""
        if self._error is not None:
            return
        self._error = error
        self._heart.remove(self)
        self._outbox.close()
        self._bulk_outbox.close()
        for event in (self._ended, self._wake, self._wake_bulk):
            event.set()
        self._on_end(self)
        if self._opened:
            _log.info("session %s with %s ended: %s", self.id, self.peer.name, error)
            self._tell(self._handler.on_broken, self, error)

    def finish(self, reason: str) -> None:
        """Ends the session of our own will: what was written before still reaches the peer within a second. Where the
        listener ends it and the dialer writes at that moment, grpc.aio may refuse the dialer what it has not read."""
        self.finished = self.finished or self._error is None
        self.end(SessionClosed(f"closed here: {reason}"))

    async def carry(self, stream: Stream) -> None:
        """Moves the frames of the Session stream until the session ends."""
        await self._carry(stream, self._receive, self._outbox.take, self._wake)

    async def carry_bulk(self, stream: Stream) -> None:
        """Moves the pieces of the Bulk stream until the session ends; the stream's end ends the session."""
        await self._carry(stream, self._receive_bulk, self._bulk_outbox.take, self._wake_bulk)

    def bind_bulk(self, hello: pb.BulkFrame) -> bool:
        """Whether the first frame of a Bulk stream belongs to this session, which takes one."""
        right = hello.epoch == self.epoch and hmac.compare_digest(hello.token, self.bulk_token)
        bound, self._bulk_bound = right and not self._bulk_bound, self._bulk_bound or right
        return bound

    async def flush(self) -> None:
        """Returns when everything queued was written, or the session has ended."""
        while self._error is None and (self._num_writing or self.num_queued_frames or self.num_queued_bytes):
            await asyncio.sleep(0.005)

    async def gone(self) -> None:
        """Returns when the session has ended and let go of its streams."""
        while self._error is None or self._num_carried:
            await asyncio.sleep(0.005)

    async def _carry(
        self, stream: Stream, receive: Callable[[bytes], None], take: Callable[[], bytes | None], wake: asyncio.Event
    ) -> None:
        reader = asyncio.create_task(self._read(stream, receive))
        writer = asyncio.create_task(self._write(stream, take, wake))
        self._num_carried += 1
        try:
            await self._ended.wait()
            if self.finished and self.dialed:
                with suppress(TimeoutError, *STREAM_ERRORS):
                    async with asyncio.timeout(_FINISH_GRACE_S):
                        await asyncio.wait((writer,))  # whoever cancels a write cancels its stream
                        await cast(DialedStream, stream).done_writing()
                        await asyncio.wait((reader,))  # until the listener has read it all
        except asyncio.CancelledError:
            self.end(SessionBroken(f"{self.peer.name} closed its stream or its process ended"))
            raise
        finally:
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            self._num_carried -= 1

    async def _read(self, stream: Stream, receive: Callable[[bytes], None]) -> None:
        try:
            while isinstance(data := await stream.read(), bytes):
                if self._error is None:
                    receive(data)
            self._num_read_out += 1
            if self._num_read_out < _NUM_STREAMS:
                # A peer that finishes ends both streams well; what is on its way on the other one still counts, also
                # where that one has not come up here yet.
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._ended.wait(), _FINISH_GRACE_S)
            reason = await last_word(cast(DialedStream, stream)) if self.dialed else ""
            self.end(SessionBroken(f"{self.peer.name} closed its stream{reason}"))
        except SessionError as error:
            self.end(error)
        except STREAM_ERRORS as error:
            await self._end_unless_told(error, told_elsewhere=receive == self._receive_bulk)

    async def _write(self, stream: Stream, take: Callable[[], bytes | None], wake: asyncio.Event) -> None:
        try:
            while self._error is None:
                data = take()
                if data is None:
                    await wake.wait()
                    wake.clear()
                    continue
                self._num_writing += 1
                await stream.write(data)
                self._num_writing -= 1
        except STREAM_ERRORS as error:
            await self._end_unless_told(error, told_elsewhere=True)

    async def _end_unless_told(self, error: Exception, *, told_elsewhere: bool) -> None:
        """The reader of the Session stream gets the status that says why; the others only see that it is over."""
        if told_elsewhere:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), _STATUS_GRACE_S)
        self.end(broken(self.peer.name, error))

    # ------------------------------------------------------------ what arrives

    def _receive(self, data: bytes) -> None:
        """Raises SessionError for what a peer must not send."""
        self.num_received += 1
        if len(data) > MAX_FRAME_BYTES + FRAME_SLACK_BYTES:
            raise SessionError(f"a frame of {len(data)} bytes; over {MAX_FRAME_BYTES} bytes a message travels in parts")
        frame = _parse(data)
        kind = frame.WhichOneof("kind")
        if kind is None:
            self._answer_unsupported(frame)
        elif kind == "heartbeat":
            self._liveness.heard(frame.heartbeat)
        elif kind in _HANDSHAKE:
            raise SessionError(f"a {kind} frame after the handshake")
        elif kind == "part":
            _check_key(frame)
            message = self._assembler.add(frame.part)
            if message is not None:
                self._receive_whole(_parse(message))
        else:
            if kind == "cancel":
                self._assembler.discard(RequestKey.of(frame.cancel.key))
            _check_key(frame)
            self._tell(self._handler.on_frame, self, frame)

    def _receive_whole(self, frame: pb.Frame) -> None:
        """A message that came in parts."""
        kind = frame.WhichOneof("kind")
        if kind in _NOT_IN_PARTS:
            raise SessionError(f"a {kind} frame inside of parts")
        if kind is None:
            self._answer_unsupported(frame)
            return
        _check_key(frame)
        self._tell(self._handler.on_frame, self, frame)

    def _answer_unsupported(self, frame: pb.Frame) -> None:
        self.num_unsupported += 1
        number = next((unknown.field_number for unknown in UnknownFieldSet(frame)), 0)
        self.send(pb.Frame(unsupported=pb.Unsupported(field_number=number)))

    def _receive_bulk(self, data: bytes) -> None:
        if len(data) > MAX_FRAME_BYTES + FRAME_SLACK_BYTES:
            raise SessionError(f"a bulk piece of {len(data)} bytes; the limit is {MAX_FRAME_BYTES}")
        try:
            frame = pb.BulkFrame.FromString(data)
        except DecodeError:
            raise SessionError(f"{len(data)} bytes on the Bulk stream are no BulkFrame") from None
        message = self._bulk_assembler.add(frame)
        if message is not None:
            self._tell(self._handler.on_bulk, self, *message)

    def _tick(self) -> None:
        self._tick_posted = False
        if self._error is None and (reason := self._liveness.tick()):
            self.end(SessionSilent(f"{self.peer.name}: {reason}"))

    def _overflow(self, key: RequestKey) -> None:
        if self._error is None:
            self._tell(self._handler.on_overflow, self, key)

    def _tell(self, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - a handler's bug ends its session, never the words thread
            _log.exception("a handler of session %s failed", self.id)
            self.end(SessionBroken(f"internal error while handling {self.peer.name}: {error!r}"))

    def _post(self, call: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # the words thread has stopped, and ended every session before
            self._loop.call_soon_threadsafe(call, *args)


def _parse(data: bytes) -> pb.Frame:
    try:
        return pb.Frame.FromString(data)
    except DecodeError:
        raise SessionError(f"{len(data)} bytes are no frame") from None


def _check_key(frame: pb.Frame) -> None:
    key = frame_key(frame)
    if key is not None and len(key.request_id.encode()) > MAX_REQUEST_ID_BYTES:
        raise SessionError(
            f"a request id of {len(key.request_id)} characters; the limit is {MAX_REQUEST_ID_BYTES} bytes"
        )

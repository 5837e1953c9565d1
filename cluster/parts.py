"""Messages in pieces: cutting those over 64 KiB, putting them together again, and the queue of bulk messages.

On the Session stream a large frame travels as Part frames (request, index, last), interleaved with other traffic;
a part without payload that is not the last one abandons its message. On the Bulk stream messages travel whole,
one after the other, in BulkFrame pieces. What a receiver keeps of unfinished messages is bounded; a peer that
goes past a bound, or sends pieces out of order, loses its session (`cluster.errors.SessionError`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

from cluster.errors import SessionError
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey

BLOCKS_TOPIC: Final = "blocks"  # of the bulk messages that tell what prefix caches hold

MAX_FRAME_BYTES: Final = 64 << 10
FRAME_SLACK_BYTES: Final = 4 << 10  # a receiver is more generous than a sender
MAX_MESSAGE_BYTES: Final = 16 << 20
MAX_OPEN_MESSAGES: Final = 64
MAX_OPEN_BYTES: Final = 64 << 20
MAX_BULK_MESSAGE_BYTES: Final = 64 << 20
MAX_REQUEST_ID_BYTES: Final = 1 << 10

_PART_BYTES: Final = MAX_FRAME_BYTES - MAX_REQUEST_ID_BYTES - 64
_BULK_PART_BYTES: Final = MAX_FRAME_BYTES - MAX_REQUEST_ID_BYTES - 64
_NO_KEY: Final = RequestKey("", 0)  # of a large frame that is about no request

# Frame kinds whose `key` names the request they are about.
_KEYED: Final = frozenset({"submit", "cancel", "kv_request", "held_request", "ticket", "release", "kv_failed", "part"})


def frame_key(frame: pb.Frame) -> RequestKey | None:
    """The request a frame is about; None for frames about none, and for StepTokens, which is about many."""
    kind = frame.WhichOneof("kind")
    return RequestKey.of(getattr(frame, kind).key) if kind in _KEYED else None


def cut(message: bytes, key: RequestKey | None, index: int) -> tuple[bytes, bool]:
    """Part `index` of a serialised frame, as a serialised frame of at most MAX_FRAME_BYTES; whether it is the last."""
    start = index * _PART_BYTES
    last = start + _PART_BYTES >= len(message)
    part = pb.Part(key=(key or _NO_KEY).wire(), index=index, last=last, payload=message[start : start + _PART_BYTES])
    return pb.Frame(part=part).SerializeToString(), last


def abandonment(key: RequestKey | None, index: int) -> bytes:
    """The frame that tells the receiver to forget the parts before `index`."""
    return pb.Frame(part=pb.Part(key=(key or _NO_KEY).wire(), index=index)).SerializeToString()


@dataclass(slots=True)
class _Open:
    payloads: list[bytes] = field(default_factory=list)
    num_bytes: int = 0


class Assembler:
    """Puts the parts of a session together. One thread."""

    def __init__(
        self,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_open: int = MAX_OPEN_MESSAGES,
        max_open_bytes: int = MAX_OPEN_BYTES,
    ) -> None:
        self._open: dict[RequestKey, _Open] = {}
        self._max_message_bytes = max_message_bytes
        self._max_open = max_open
        self._max_open_bytes = max_open_bytes
        self.num_bytes = 0  # held for unfinished messages

    @property
    def num_open(self) -> int:
        return len(self._open)

    def add(self, part: pb.Part) -> bytes | None:
        """The whole message with its last part, else None. Raises SessionError, after which the session must end."""
        key = RequestKey.of(part.key)
        parts = self._open.get(key)
        expected = len(parts.payloads) if parts else 0
        if part.index != expected:
            raise SessionError(f"part {part.index} of a message of request {key.request_id!r}, expected {expected}")
        if not part.payload and not part.last:
            self.discard(key)
            return None
        if parts is None:
            if len(self._open) >= self._max_open:
                raise SessionError(f"more than {self._max_open} unfinished messages; finish or abandon one first")
            parts = self._open[key] = _Open()
        parts.payloads.append(part.payload)
        parts.num_bytes += len(part.payload)
        self.num_bytes += len(part.payload)
        if parts.num_bytes > self._max_message_bytes:
            raise SessionError(
                f"a message of request {key.request_id!r} has {parts.num_bytes} bytes and more to come; "
                f"the limit is {self._max_message_bytes}"
            )
        if self.num_bytes > self._max_open_bytes:
            raise SessionError(f"unfinished messages hold {self.num_bytes} bytes; the limit is {self._max_open_bytes}")
        if not part.last:
            return None
        self.discard(key)
        return b"".join(parts.payloads)

    def discard(self, key: RequestKey) -> bool:
        """Forgets the parts of a request; whether there were any."""
        parts = self._open.pop(key, None)
        if parts is None:
            return False
        self.num_bytes -= parts.num_bytes
        return True


class BulkOutbox:
    """Bulk messages that wait to be written, in order. `put` and `close` from any thread, `take` from the writer's.

    `wake` is called, on the putting thread, when a message arrives after `take` returned None.
    """

    def __init__(self, wake: Callable[[], None], *, max_bytes: int) -> None:
        self._wake = wake
        self._max_bytes = max_bytes
        self._lock = Lock()
        self._messages: deque[tuple[str, bytes]] = deque()
        self._message_id = 0
        self._offset = 0
        self._idle = False
        self._closed = False
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def put(self, topic: str, payload: bytes) -> bool:
        """False if the message does not fit and was dropped whole: its topic needs a fresh start."""
        assert len(topic.encode()) <= MAX_REQUEST_ID_BYTES, topic
        with self._lock:
            if (
                self._closed
                or len(payload) > MAX_BULK_MESSAGE_BYTES
                or self._num_bytes + len(payload) > self._max_bytes
            ):
                return False
            self._messages.append((topic, payload))
            self._num_bytes += len(payload)
            wake, self._idle = self._idle, False
        if wake:
            self._wake()
        return True

    def take(self) -> bytes | None:
        """The next piece, serialised."""
        with self._lock:
            if not self._messages:
                self._idle = True
                return None
            topic, payload = self._messages[0]
            piece = payload[self._offset : self._offset + _BULK_PART_BYTES]
            self._offset += len(piece)
            last = self._offset == len(payload)
            frame = pb.BulkFrame(message_id=self._message_id, topic=topic, payload=piece, last=last)
            if last:
                self._messages.popleft()
                self._num_bytes -= len(payload)
                self._message_id += 1
                self._offset = 0
        return frame.SerializeToString()

    def close(self) -> None:
        """Drops what waits; from now on `put` refuses."""
        with self._lock:
            self._closed = True
            self._messages.clear()
            self._num_bytes = self._offset = 0


class BulkAssembler:
    """Puts the pieces of a Bulk stream together. One thread."""

    def __init__(self, *, max_message_bytes: int = MAX_BULK_MESSAGE_BYTES) -> None:
        self._max_message_bytes = max_message_bytes
        self._message_id = 0
        self._topic = ""
        self._parts = _Open()

    def add(self, frame: pb.BulkFrame) -> tuple[str, bytes] | None:
        """(topic, payload) with the last piece, else None. Raises SessionError, after which the session must end."""
        if frame.message_id != self._message_id:
            raise SessionError(f"a piece of bulk message {frame.message_id}, expected {self._message_id}")
        if self._parts.payloads and frame.topic != self._topic:
            raise SessionError(f"bulk message {frame.message_id} changed its topic to {frame.topic!r}")
        self._topic = frame.topic
        self._parts.payloads.append(frame.payload)
        self._parts.num_bytes += len(frame.payload)
        if self._parts.num_bytes > self._max_message_bytes:
            raise SessionError(
                f"a bulk message about {frame.topic!r} is over the limit of {self._max_message_bytes} bytes"
            )
        if not frame.last:
            return None
        parts, self._parts = self._parts, _Open()
        self._message_id += 1
        return frame.topic, b"".join(parts.payloads)

"""What waits to be written to one peer's Session: bounded, fair, and never in the way of the thread that sends.

A *lane* holds what waits about one request, in order; only the head of a lane may be written. Lanes take turns:
heads of at most 64 KiB go first come, first served; tokens of all requests leave in one StepTokens frame; large
heads leave in parts, one part of each in turn, and only when nothing small waits (one part after every
`_SMALL_PER_PART` small frames, so that they do not starve). New tokens of a request are merged into those that
still wait.

A request that has too much waiting ends alone: all of it is dropped, later frames of it are dropped too until one
that ends it (Cancel, Release, KvFailed, tokens with a finish reason), and `on_overflow` is told.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

from cluster.parts import MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, MAX_REQUEST_ID_BYTES, abandonment, cut, frame_key
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey

MAX_INTERLEAVED: Final = 32  # large messages cut at the same time; under the receiver's limit of open ones
_SMALL_PER_PART: Final = 16
_FULL_TOKENS_BYTES: Final = 16 << 10  # merged tokens of one request past this go into the next StepTokens
_TOKENS_FRAME_BYTES: Final = MAX_FRAME_BYTES - 1024
_MAX_ENDED: Final = 4096
_ENDING: Final = frozenset({"cancel", "release", "kv_failed"})
_ENTRY_BYTES: Final = 64  # counted for every entry, so that tiny ones are bounded too


class _Message:
    """One serialised frame; a large one is cut while it is written."""

    __slots__ = ("data", "dead", "key", "num_bytes", "num_cut")

    def __init__(self, key: RequestKey | None, data: bytes) -> None:
        self.key = key
        self.data = data
        self.num_bytes = len(data) + _ENTRY_BYTES
        self.num_cut = 0  # parts already written
        self.dead = False

    @property
    def large(self) -> bool:
        return len(self.data) > MAX_FRAME_BYTES


class _Tokens:
    """Tokens of one request that wait."""

    __slots__ = ("dead", "key", "num_bytes", "sequences")

    def __init__(self, key: RequestKey) -> None:
        self.key = key
        self.sequences: list[pb.SequenceTokens] = []
        self.num_bytes = _ENTRY_BYTES
        self.dead = False

    def merge(self, new: pb.SequenceTokens, num_bytes: int) -> None:
        """Appends to the tokens of the same sample where they go on, and their prompt logprobs, too; the indices stay
        those of the first."""
        self.num_bytes += num_bytes
        for old in reversed(self.sequences):
            if old.sample == new.sample:
                if old.finish or new.first_token_index != old.first_token_index + len(old.token_ids):
                    break
                num_before = len(old.prompt_logprobs)
                if (
                    num_before
                    and new.prompt_logprobs
                    and new.first_prompt_logprob != old.first_prompt_logprob + num_before
                ):
                    break
                first, first_prompt = old.first_token_index, old.first_prompt_logprob
                old.MergeFrom(new)
                old.first_token_index = first
                if num_before:
                    old.first_prompt_logprob = first_prompt
                return
        self.sequences.append(new)


@dataclass(slots=True)
class _Lane:
    waiting: deque[_Message | _Tokens]
    num_bytes: int = 0


@dataclass(slots=True)
class _News:
    """What a put has to tell once it has given the lock back."""

    wake: bool = False
    overflowed: list[RequestKey] = field(default_factory=list)
    full: str = ""


class Outbox:
    """`put*` and `close` from any thread, never blocking; `take` from the writer's thread only.

    Called on the putting thread, without the lock: `wake` when something arrives after `take` returned None,
    `on_overflow(key)` when a request overflowed, `on_full(reason)` when a frame that belongs to no request, or
    that ends one, does not fit even into the reserve (as much again as the bounds): the session must end.
    """

    def __init__(
        self,
        wake: Callable[[], None],
        on_overflow: Callable[[RequestKey], None],
        on_full: Callable[[str], None],
        *,
        max_bytes: int,
        max_request_bytes: int,
        max_frames: int,
    ) -> None:
        self._wake = wake
        self._on_overflow = on_overflow
        self._on_full = on_full
        self._max_bytes = max_bytes
        self._max_request_bytes = max_request_bytes
        self._max_frames = max_frames
        self._lock = Lock()
        self._lanes: dict[RequestKey | None, _Lane] = {}
        self._heartbeat: bytes | None = None
        self._small: deque[_Message | None] = deque()  # small heads; None stands for the waiting tokens
        self._tokens: deque[_Tokens] = deque()  # heads too
        self._ring: deque[_Message] = deque()  # large heads being cut
        self._behind_ring: deque[_Message] = deque()
        self._ended: OrderedDict[RequestKey | None, None] = (
            OrderedDict()
        )  # overflowed, awaiting the frame that ends them
        self._step = 0
        self._since_part = 0
        self._idle = False
        self._closed = False
        self._num_bytes = 0
        self._num_frames = 0

    @property
    def num_bytes(self) -> int:
        """Bytes waiting. A large message counts whole until its last part is taken."""
        return self._num_bytes

    @property
    def num_frames(self) -> int:
        return self._num_frames

    def put(self, frame: pb.Frame, key: RequestKey | None = None) -> None:
        """Queues a frame about `key` (found in the frame where its kind carries one)."""
        key = key or frame_key(frame)
        assert key is None or len(key.request_id.encode()) <= MAX_REQUEST_ID_BYTES, key
        kind = frame.WhichOneof("kind")
        message = _Message(key, frame.SerializeToString())
        news = _News()
        with self._lock:
            if kind == "cancel":
                self._discard(key, from_large=True)
            if self._admit(key, message.num_bytes, kind in _ENDING, news):
                self._append(message)
            self._note_put(news)
        self._tell(news)

    def put_tokens(self, step: int, sequences: Iterable[pb.SequenceTokens]) -> None:
        """Queues the new tokens of a step. The sequences belong to the outbox from now on."""
        news = _News()
        with self._lock:
            self._step = step
            for sequence in sequences:
                key = RequestKey.of(sequence.key)
                num_bytes = sequence.ByteSize() + 8
                ends = sequence.finish != pb.FINISH_UNSPECIFIED
                if num_bytes <= _FULL_TOKENS_BYTES:
                    if self._admit(key, num_bytes, ends, news):
                        self._append_tokens(key, sequence, num_bytes)
                    continue
                alone = pb.Frame(step_tokens=pb.StepTokens(step=step, sequences=[sequence]))
                message = _Message(key, alone.SerializeToString())
                if self._admit(key, message.num_bytes, ends, news):
                    self._append(message)
            self._note_put(news)
        self._tell(news)

    def put_heartbeat(self, data: bytes) -> None:
        """The next frame to be taken; replaces one that still waits."""
        news = _News()
        with self._lock:
            if self._closed:
                return
            self._heartbeat = data
            self._note_put(news)
        self._tell(news)

    def take(self) -> bytes | None:
        """The next frame to write, serialised, at most 64 KiB; None if nothing waits."""
        with self._lock:
            if self._heartbeat is not None:
                data, self._heartbeat = self._heartbeat, None
                return data
            if self._since_part >= _SMALL_PER_PART and (data := self._take_part()) is not None:
                return data
            while self._small:
                head = self._small.popleft()
                if head is not None and head.dead:
                    continue
                data = self._take_tokens() if head is None else self._finish(head)
                if data is not None:
                    self._since_part += 1
                    return data
            data = self._take_part()
            self._idle = data is None
            return data

    def close(self) -> None:
        """Drops what waits; from now on everything put is dropped."""
        with self._lock:
            self._closed = True
            self._heartbeat = None
            for queue in (self._small, self._tokens, self._ring, self._behind_ring, self._lanes, self._ended):
                queue.clear()
            self._num_bytes = self._num_frames = 0

    # ------------------------------------------------------------ putting; under the lock unless said otherwise

    def _admit(self, key: RequestKey | None, num_bytes: int, ends: bool, news: _News) -> bool:
        """Whether an entry may be queued; otherwise `news` says what ends because of it, if anything does."""
        if self._closed:
            return False
        if ends:
            if self._num_frames < 2 * self._max_frames and self._num_bytes + num_bytes <= 2 * self._max_bytes:
                self._ended.pop(key, None)
                return True
            news.full = self._full_reason()
            return False
        if key in self._ended:
            return False
        lane = self._lanes.get(key)
        if (
            self._num_frames < self._max_frames
            and self._num_bytes + num_bytes <= self._max_bytes
            and (key is None or (lane.num_bytes if lane else 0) + num_bytes <= self._max_request_bytes)
            and num_bytes <= MAX_MESSAGE_BYTES
        ):
            return True
        if key is None:
            news.full = self._full_reason()
            return False
        self._discard(key)
        self._ended[key] = None
        if len(self._ended) > _MAX_ENDED:
            self._ended.popitem(last=False)
        news.overflowed.append(key)
        return False

    def _full_reason(self) -> str:
        return f"{self._num_frames} frames, {self._num_bytes} bytes wait to be written: the peer does not read"

    def _append(self, entry: _Message) -> None:
        lane = self._lane(entry.key)
        lane.waiting.append(entry)
        self._count(lane, 1, entry.num_bytes)
        if len(lane.waiting) == 1:
            self._make_ready(entry)

    def _append_tokens(self, key: RequestKey, sequence: pb.SequenceTokens, num_bytes: int) -> None:
        lane = self._lane(key)
        last = lane.waiting[-1] if lane.waiting else None
        if isinstance(last, _Tokens) and last.num_bytes + num_bytes <= _FULL_TOKENS_BYTES:
            last.merge(sequence, num_bytes)
            self._count(lane, 0, num_bytes)
            return
        entry = _Tokens(key)
        entry.merge(sequence, num_bytes)
        lane.waiting.append(entry)
        self._count(lane, 1, entry.num_bytes)
        if len(lane.waiting) == 1:
            self._make_ready(entry)

    def _lane(self, key: RequestKey | None) -> _Lane:
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(deque())
        return lane

    def _count(self, lane: _Lane, num_frames: int, num_bytes: int) -> None:
        lane.num_bytes += num_bytes
        self._num_frames += num_frames
        self._num_bytes += num_bytes

    def _make_ready(self, head: _Message | _Tokens) -> None:
        if isinstance(head, _Tokens):
            if not self._tokens:
                self._small.append(None)
            self._tokens.append(head)
        elif not head.large:
            self._small.append(head)
        elif len(self._ring) < MAX_INTERLEAVED:
            self._ring.append(head)
        else:
            self._behind_ring.append(head)

    def _discard(self, key: RequestKey | None, *, from_large: bool = False) -> None:
        """Drops what waits about a request, or what waits from its first large message on."""
        lane = self._lanes.get(key)
        if lane is None:
            return
        kept = 0
        if from_large:
            large = (i for i, entry in enumerate(lane.waiting) if isinstance(entry, _Message) and entry.large)
            kept = next(large, len(lane.waiting))
        abandoned: bytes | None = None
        while len(lane.waiting) > kept:
            entry = lane.waiting.pop()
            entry.dead = True
            self._count(lane, -1, -entry.num_bytes)
            if isinstance(entry, _Message) and entry.num_cut:
                abandoned = abandonment(key, entry.num_cut)
        if abandoned is not None:  # its message was the head, so the lane is empty now
            notice = _Message(key, abandoned)
            lane.waiting.append(notice)
            self._count(lane, 1, notice.num_bytes)
            self._small.appendleft(notice)  # first, so that the receiver never holds more open messages than the ring
        elif not lane.waiting:
            del self._lanes[key]

    def _note_put(self, news: _News) -> None:
        news.wake, self._idle = self._idle, False

    def _tell(self, news: _News) -> None:
        """Without the lock: the callbacks may put."""
        if news.wake:
            self._wake()
        for key in news.overflowed:
            self._on_overflow(key)
        if news.full:
            self._on_full(news.full)

    # ------------------------------------------------------------ taking; under the lock

    def _finish(self, head: _Message | _Tokens) -> bytes:
        """Removes the head of a lane; the next in it becomes ready. The frame, for a message."""
        lane = self._lanes[head.key]
        removed = lane.waiting.popleft()
        assert removed is head
        self._count(lane, -1, -head.num_bytes)
        if lane.waiting:
            self._make_ready(lane.waiting[0])
        else:
            del self._lanes[head.key]
        return head.data if isinstance(head, _Message) else b""

    def _take_tokens(self) -> bytes | None:
        """As many waiting tokens as fit into one frame."""
        frame = pb.Frame()
        size = 0
        ready = self._tokens
        self._tokens = deque()
        while ready:
            entry = ready[0]
            if not entry.dead:
                if size and size + entry.num_bytes > _TOKENS_FRAME_BYTES:
                    break
                size += entry.num_bytes
                frame.step_tokens.sequences.extend(entry.sequences)
                self._finish(entry)
            ready.popleft()
        if ready and not self._tokens:
            self._small.append(None)  # the rest takes its turn again
        ready.extend(self._tokens)
        self._tokens = ready
        if not size:
            return None
        frame.step_tokens.step = self._step
        return frame.SerializeToString()

    def _take_part(self) -> bytes | None:
        while self._ring or self._behind_ring:
            if not self._ring:
                self._ring.append(self._behind_ring.popleft())
            head = self._ring.popleft()
            if not head.dead:
                self._since_part = 0
                data, last = cut(head.data, head.key, head.num_cut)
                head.num_cut += 1
                if not last:
                    self._ring.append(head)
                    return data
                self._refill_ring()
                self._finish(head)
                return data
            self._refill_ring()
        return None

    def _refill_ring(self) -> None:
        if self._behind_ring:
            self._ring.append(self._behind_ring.popleft())

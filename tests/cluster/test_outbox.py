from __future__ import annotations

from collections import defaultdict
from threading import Thread

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.outbox import MAX_INTERLEAVED, Outbox
from cluster.parts import MAX_FRAME_BYTES, MAX_OPEN_MESSAGES, Assembler, frame_key
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey

A, B, C = RequestKey("a", 0), RequestKey("b", 0), RequestKey("c", 3)
KEYS = [A, B, C]
MIB = 1 << 20


class Box:
    """An outbox and the receiver at its other end, which keeps what arrives per request, in order."""

    def __init__(
        self, *, max_bytes: int = 64 * MIB, max_request_bytes: int = 16 * MIB, max_frames: int = 10_000
    ) -> None:
        self.overflowed: list[RequestKey] = []
        self.full: list[str] = []
        self.wakes = 0
        self.outbox = Outbox(
            self._woken,
            self.overflowed.append,
            self.full.append,
            max_bytes=max_bytes,
            max_request_bytes=max_request_bytes,
            max_frames=max_frames,
        )
        self.assembler = Assembler()
        self.arrived: dict[RequestKey, list[int]] = defaultdict(list)
        self.order: list[tuple[str, RequestKey | None]] = []

    def _woken(self) -> None:
        self.wakes += 1

    def send(self, key: RequestKey, serial: int, num_tokens: int = 0) -> None:
        submit = pb.Submit(key=key.wire(), priority=serial, prompt_token_ids=[100_000] * num_tokens)
        self.outbox.put(pb.Frame(submit=submit))

    def send_tokens(
        self, key: RequestKey, first: int, *tokens: int, finish: pb.FinishReason = pb.FINISH_UNSPECIFIED
    ) -> None:
        self.outbox.put_tokens(
            first, [pb.SequenceTokens(key=key.wire(), first_token_index=first, token_ids=tokens, finish=finish)]
        )

    def cancel(self, key: RequestKey) -> None:
        self.outbox.put(pb.Frame(cancel=pb.Cancel(key=key.wire())))

    def take(self) -> pb.Frame | None:
        """Takes one frame and delivers it."""
        data = self.outbox.take()
        if data is None:
            return None
        assert len(data) <= MAX_FRAME_BYTES
        frame = pb.Frame.FromString(data)
        self.order.append((frame.WhichOneof("kind") or "", frame_key(frame)))
        whole: pb.Frame | None = frame
        if frame.HasField("part"):
            message = self.assembler.add(frame.part)
            whole = None if message is None else pb.Frame.FromString(message)
        if whole is not None:
            self._deliver(whole)
        return frame

    def _deliver(self, frame: pb.Frame) -> None:
        if frame.HasField("submit"):
            self.arrived[RequestKey.of(frame.submit.key)].append(frame.submit.priority)
        elif frame.HasField("cancel"):
            key = RequestKey.of(frame.cancel.key)
            self.assembler.discard(key)
            self.arrived[key].append(-1)
        for sequence in frame.step_tokens.sequences:
            arrived = self.arrived[RequestKey.of(sequence.key)]
            if sequence.token_ids:
                assert sequence.token_ids[0] >= sequence.first_token_index
            arrived.extend(sequence.token_ids)

    def drain(self) -> list[pb.Frame]:
        frames = []
        while (frame := self.take()) is not None:
            frames.append(frame)
        return frames


class Interleaving(RuleBasedStateMachine):
    """Any interleaving of sending, cancelling and writing delivers each message once, in the order of its request."""

    def __init__(self) -> None:
        super().__init__()
        self.box = Box()
        self.serial = 0
        self.sent: dict[RequestKey, list[int]] = {key: [] for key in KEYS}
        self.excusable: dict[RequestKey, set[int]] = {key: set() for key in KEYS}  # a cancel may have dropped them

    def _next(self, key: RequestKey) -> int:
        self.serial += 1
        self.sent[key].append(self.serial)
        return self.serial

    @rule(key=st.sampled_from(KEYS))
    def small(self, key: RequestKey) -> None:
        self.box.send(key, self._next(key))

    @rule(key=st.sampled_from(KEYS), num_tokens=st.integers(22_000, 90_000))  # three bytes each
    def large(self, key: RequestKey, num_tokens: int) -> None:
        self.box.send(key, self._next(key), num_tokens)

    @rule(key=st.sampled_from(KEYS), count=st.integers(1, 3))
    def tokens(self, key: RequestKey, count: int) -> None:
        tokens = [self._next(key) for _ in range(count)]
        self.box.send_tokens(key, tokens[0], *tokens)

    @rule(key=st.sampled_from(KEYS))
    def cancel(self, key: RequestKey) -> None:
        self.excusable[key].update(self.sent[key])
        self.sent[key].append(-1)
        self.box.cancel(key)

    @rule(count=st.integers(1, 6))
    def write(self, count: int) -> None:
        for _ in range(count):
            self.box.take()

    @invariant()
    def arrives_in_order(self) -> None:
        for key in KEYS:
            remaining = iter(self.sent[key])
            assert all(any(one == sent for sent in remaining) for one in self.box.arrived[key])

    def teardown(self) -> None:
        self.box.drain()
        for key in KEYS:
            arrived = self.box.arrived[key]
            missing = set(self.sent[key]) - set(arrived)
            assert missing <= self.excusable[key]
            assert arrived.count(-1) == self.sent[key].count(-1)
            if -1 not in self.sent[key]:
                assert arrived == self.sent[key]
        assert self.box.outbox.num_bytes == self.box.outbox.num_frames == 0
        assert self.box.assembler.num_open == self.box.assembler.num_bytes == 0
        assert not self.box.overflowed and not self.box.full


TestInterleaving = Interleaving.TestCase


class Bounds(RuleBasedStateMachine):
    """Whatever is sent and however slowly it is read, the outbox stays within its bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.box = Box(max_bytes=300_000, max_request_bytes=200_000, max_frames=12)
        self.serial = 0

    @rule(key=st.sampled_from(KEYS), num_tokens=st.sampled_from([0, 10, 10_000, 30_000, 80_000]))
    def send(self, key: RequestKey, num_tokens: int) -> None:
        self.serial += 1
        self.box.send(key, self.serial, num_tokens)

    @rule(key=st.sampled_from(KEYS), count=st.integers(1, 4000))
    def tokens(self, key: RequestKey, count: int) -> None:
        self.serial += count
        self.box.send_tokens(key, self.serial - count, *range(self.serial - count, self.serial))

    @rule(key=st.sampled_from(KEYS))
    def cancel(self, key: RequestKey) -> None:
        self.box.cancel(key)

    @rule(count=st.integers(1, 4))
    def write(self, count: int) -> None:
        for _ in range(count):
            self.box.take()

    @invariant()
    def bounded(self) -> None:
        assert 0 <= self.box.outbox.num_bytes <= 2 * 300_000
        assert 0 <= self.box.outbox.num_frames <= 2 * 12 + len(KEYS)
        assert self.box.assembler.num_open <= len(KEYS)

    def teardown(self) -> None:
        self.box.drain()
        assert self.box.outbox.num_bytes == self.box.outbox.num_frames == 0
        assert self.box.assembler.num_open == 0


TestBounds = Bounds.TestCase


def test_small_frames_do_not_wait_for_large_ones_of_other_requests() -> None:
    box = Box()
    box.send(A, 1, 200_000)
    box.take()
    box.send(B, 2)
    box.send_tokens(C, 3, 3)
    _ = box.take(), box.take()
    assert [kind for kind, _ in box.order] == ["part", "submit", "step_tokens"]
    box.drain()
    assert box.arrived[A] == [1]


def test_large_messages_take_turns_part_by_part() -> None:
    box = Box()
    for key in KEYS:
        box.send(key, 1, 60_000)
    box.drain()
    num_parts = len(box.order) // 3
    assert num_parts >= 3
    assert box.order == [("part", key) for key in KEYS] * num_parts


def test_large_messages_do_not_starve() -> None:
    box = Box()
    box.send(A, 1, 60_000)
    for serial in range(200):
        box.send(RequestKey(f"small-{serial}", 0), serial)
    box.drain()
    assert box.order.index(("part", A)) < 20


def test_no_more_large_messages_are_open_at_once_than_the_receiver_allows() -> None:
    box = Box()
    keys = [RequestKey(str(i), 0) for i in range(3 * MAX_INTERLEAVED)]
    most = 0
    for key in keys:
        box.send(key, 7, 50_000)
    for key in keys[:10]:
        for _ in range(12):
            box.take()
            most = max(most, box.assembler.num_open)
        box.cancel(key)
    while box.take() is not None:
        most = max(most, box.assembler.num_open)
    assert MAX_INTERLEAVED <= most < MAX_OPEN_MESSAGES
    assert all(box.arrived[key] == [7] for key in keys[10:])


def test_a_cancel_drops_the_parts_not_yet_written_and_those_received() -> None:
    box = Box()
    box.send(A, 1, 100_000)
    box.take()
    assert box.assembler.num_open == 1
    box.send(A, 2)
    box.cancel(A)
    frames = box.drain()
    assert [frame.WhichOneof("kind") for frame in frames] == ["part", "cancel"]
    assert frames[0].part.payload == b"" and not frames[0].part.last
    assert box.arrived[A] == [-1]


def test_waiting_tokens_of_a_request_are_merged_in_order() -> None:
    box = Box()
    for step in range(100):
        sequences = [
            pb.SequenceTokens(key=key.wire(), first_token_index=step + 5, token_ids=[step + 5]) for key in KEYS
        ]
        box.outbox.put_tokens(step, sequences)
    box.send_tokens(A, 105, 105, finish=pb.STOP)
    (frame,) = box.drain()
    assert frame.step_tokens.step == 105
    assert [(s.first_token_index, len(s.token_ids), s.finish) for s in frame.step_tokens.sequences] == [
        (5, 101, pb.STOP),
        (5, 100, pb.FINISH_UNSPECIFIED),
        (5, 100, pb.FINISH_UNSPECIFIED),
    ]
    assert all(box.arrived[key][:100] == list(range(5, 105)) for key in KEYS)


def test_tokens_of_several_samples_and_tokens_that_do_not_go_on_stay_apart() -> None:
    box = Box()

    def tokens(sample: int, first: int, *ids: int) -> pb.SequenceTokens:
        return pb.SequenceTokens(key=A.wire(), sample=sample, first_token_index=first, token_ids=ids)

    box.outbox.put_tokens(1, [tokens(0, 0, 10), tokens(1, 0, 20)])
    box.outbox.put_tokens(2, [tokens(0, 1, 11), tokens(1, 1, 21), tokens(0, 5, 15)])
    data = box.outbox.take()
    assert data is not None
    sequences = pb.Frame.FromString(data).step_tokens.sequences
    assert [(s.sample, s.first_token_index, list(s.token_ids)) for s in sequences] == [
        (0, 0, [10, 11]),
        (1, 0, [20, 21]),
        (0, 5, [15]),
    ]


def test_a_backlog_of_tokens_leaves_in_frames_of_bounded_size() -> None:
    box = Box()
    keys = [RequestKey(f"request-{i}", 0) for i in range(64)]
    for start in range(0, 4000, 500):
        sequences = (
            pb.SequenceTokens(key=key.wire(), first_token_index=start, token_ids=range(start, start + 500))
            for key in keys
        )
        box.outbox.put_tokens(start, list(sequences))
    frames = box.drain()
    assert 5 < len(frames) < 64
    assert all(box.arrived[key] == list(range(4000)) for key in keys)


def test_a_request_that_overflows_ends_alone() -> None:
    box = Box(max_request_bytes=100_000)
    box.send(A, 1, 30_000)
    box.take()
    box.send(B, 1)
    box.send(A, 2, 10_000)
    assert box.overflowed == [A] and not box.full
    box.send(A, 3)  # what follows is dropped, without telling again
    box.send_tokens(A, 4, 4)
    box.drain()
    assert box.arrived == {B: [1]} and box.assembler.num_open == 0 and box.overflowed == [A]
    box.send_tokens(A, 9, 9, finish=pb.ERROR)  # until the frame that ends it
    box.send(A, 10)
    box.drain()
    assert box.arrived[A] == [9, 10]


def test_a_message_over_the_limit_overflows_its_request() -> None:
    box = Box(max_bytes=64 * MIB, max_request_bytes=64 * MIB)
    box.send(A, 1, 6_000_000)
    assert box.overflowed == [A]
    assert box.outbox.take() is None


def test_frames_that_end_requests_use_a_reserve_and_its_end_ends_the_session() -> None:
    box = Box(max_frames=4)
    for serial in range(4):
        box.send(RequestKey(str(serial), 0), serial)
    box.send(A, 5)
    assert box.overflowed == [A]
    for serial in range(4):
        box.cancel(RequestKey(str(serial), 0))
    assert not box.full
    box.cancel(B)
    assert len(box.full) == 1 and "the peer does not read" in box.full[0]


def test_a_frame_about_no_request_that_does_not_fit_ends_the_session() -> None:
    box = Box(max_frames=2)
    for _ in range(3):
        box.outbox.put(pb.Frame(load_report=pb.LoadReport()))
    assert len(box.full) == 1 and not box.overflowed


def test_heartbeats_go_first_and_do_not_pile_up() -> None:
    box = Box()
    box.send(A, 1)
    for sequence in range(50):
        box.outbox.put_heartbeat(pb.Frame(heartbeat=pb.Heartbeat(sequence=sequence)).SerializeToString())
    frames = box.drain()
    assert [frame.WhichOneof("kind") for frame in frames] == ["heartbeat", "submit"]
    assert frames[0].heartbeat.sequence == 49


def test_the_writer_is_woken_once_when_it_waits() -> None:
    box = Box()
    assert box.outbox.take() is None
    box.send(A, 1)
    box.send(A, 2)
    assert box.wakes == 1
    box.drain()
    box.send_tokens(B, 1, 1)
    assert box.wakes == 2


def test_a_closed_outbox_drops_everything() -> None:
    box = Box(max_frames=2)
    box.send(A, 1)
    box.outbox.close()
    for serial in range(5):
        box.send(A, serial)
        box.send_tokens(A, serial, serial)
    box.cancel(A)
    assert box.outbox.take() is None and not box.overflowed and not box.full


def test_many_threads_may_send_at_once() -> None:
    box = Box()
    keys = [RequestKey(f"thread-{i}", 0) for i in range(4)]

    def send(key: RequestKey) -> None:
        for serial in range(0, 400, 2):
            box.send(key, serial)
            box.send_tokens(key, serial + 1, serial + 1)

    threads = [Thread(target=send, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        box.take()
    box.drain()
    assert all(box.arrived[key] == list(range(400)) for key in keys)

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import SessionError
from cluster.parts import MAX_FRAME_BYTES, Assembler, BulkAssembler, BulkOutbox, abandonment, cut
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey

A, B, C = RequestKey("a", 0), RequestKey("b", 0), RequestKey("c", 3)
KEYS = [A, B, C]
MIB = 1 << 20


def part(index: int, payload: bytes = b"x", *, key: RequestKey = A, last: bool = False) -> pb.Part:
    return pb.Part(key=key.wire(), index=index, last=last, payload=payload)


@given(st.binary(max_size=400_000), st.sampled_from([*KEYS, None]))
def test_what_was_cut_is_put_together_again(message: bytes, key: RequestKey | None) -> None:
    assembler, index = Assembler(), 0
    while True:
        data, last = cut(message, key, index)
        assert len(data) <= MAX_FRAME_BYTES
        whole = assembler.add(pb.Frame.FromString(data).part)
        index += 1
        if last:
            break
        assert whole is None
    assert whole == message and assembler.num_open == assembler.num_bytes == 0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([part(1)], "part 1 of a message of request 'a', expected 0"),
        ([part(0), part(0)], "part 0 of a message of request 'a', expected 1"),
        ([part(0), part(2)], "part 2 of a message of request 'a', expected 1"),
        ([part(0), part(1, b""), part(2)], "part 2 of a message of request 'a', expected 0"),
        ([part(0, bytes(60)), part(1, bytes(60))], "has 120 bytes and more to come; the limit is 100"),
        ([part(0, key=A), part(0, key=B), part(0, key=C)], "more than 2 unfinished messages"),
        (
            [part(0, bytes(90), key=A), part(0, bytes(90), key=B)],
            "unfinished messages hold 180 bytes; the limit is 150",
        ),
    ],
)
def test_parts_out_of_order_or_bound_are_errors(parts: list[pb.Part], message: str) -> None:
    assembler = Assembler(max_message_bytes=100, max_open=2, max_open_bytes=150)
    for one in parts[:-1]:
        assert assembler.add(one) is None
    with pytest.raises(SessionError, match=message):
        assembler.add(parts[-1])


def test_an_abandoned_message_is_forgotten() -> None:
    assembler = Assembler()
    assembler.add(part(0))
    assert assembler.add(pb.Frame.FromString(abandonment(A, 1)).part) is None
    assert assembler.num_open == 0
    assert assembler.add(part(0, b"again", last=True)) == b"again"


@given(st.lists(st.tuples(st.sampled_from(["events", "dump"]), st.integers(0, 300_000)), max_size=5))
def test_bulk_messages_arrive_whole_and_in_order(messages: list[tuple[str, int]]) -> None:
    wakes: list[int] = []
    outbox, assembler = BulkOutbox(lambda: wakes.append(1), max_bytes=4 * MIB), BulkAssembler()
    assert outbox.take() is None
    sent = [(topic, bytes([i]) * size) for i, (topic, size) in enumerate(messages)]
    for topic, payload in sent:
        assert outbox.put(topic, payload)
    arrived = []
    while (data := outbox.take()) is not None:
        assert len(data) <= MAX_FRAME_BYTES
        whole = assembler.add(pb.BulkFrame.FromString(data))
        if whole is not None:
            arrived.append(whole)
    assert arrived == sent and outbox.num_bytes == 0 and len(wakes) == bool(sent)


def test_bulk_messages_that_do_not_fit_are_refused_whole() -> None:
    outbox = BulkOutbox(lambda: None, max_bytes=100)
    assert outbox.put("dump", bytes(90))
    assert not outbox.put("dump", bytes(20))
    assert outbox.take() is not None
    assert outbox.put("dump", bytes(20))
    outbox.close()
    assert not outbox.put("dump", b"") and outbox.take() is None


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([pb.BulkFrame(message_id=1)], "bulk message 1, expected 0"),
        ([pb.BulkFrame(topic="a", payload=b"x"), pb.BulkFrame(topic="b")], "changed its topic to 'b'"),
        ([pb.BulkFrame(topic="a", payload=bytes(60))] * 2, "'a' is over the limit of 100 bytes"),
    ],
)
def test_bulk_pieces_out_of_order_or_bound_are_errors(frames: list[pb.BulkFrame], message: str) -> None:
    assembler = BulkAssembler(max_message_bytes=100)
    for frame in frames[:-1]:
        assert assembler.add(frame) is None
    with pytest.raises(SessionError, match=message):
        assembler.add(frames[-1])

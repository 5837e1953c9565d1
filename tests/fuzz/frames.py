"""What a peer may send that holds the cluster secret and has lost its mind: frames of every kind with fields at their
edges, frames that were damaged on the way, pieces of frames, and bytes that are none.

A case is one message, drawn from a `random.Random`: the same seed makes the same messages, and a call of any seed is
cheap enough for tens of thousands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from cluster.parts import FRAME_SLACK_BYTES, MAX_FRAME_BYTES, MAX_REQUEST_ID_BYTES, cut
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey

KINDS: Final = tuple(field.name for field in pb.Frame.DESCRIPTOR.oneofs_by_name["kind"].fields)
IDS: Final = ("", "a", "b", "c", "é" * 40, "i" * MAX_REQUEST_ID_BYTES, "i" * (MAX_REQUEST_ID_BYTES + 1))
_POLITE: Final = tuple(
    kind for kind in KINDS if kind not in ("hello", "challenge", "proof", "ready", "refused", "part")
)
_HASH: Final = bytes(range(16))
_BYTES: Final = (b"", b"\x00", _HASH, _HASH[:15], _HASH * 4, bytes(32), b"\xff" * 33)
_FLOATS: Final = (0.0, -0.0, 1.0, 0.5, -1.0, 1e-45, 3e38, math.inf, -math.inf, math.nan)
_DEPTH: Final = 6
_Field = Any  # a FieldDescriptor: protobuf has two classes of them, and shows one


def message(random: Random, ids: Sequence[str] = IDS) -> bytes:
    """One case. `ids`: of requests, so that some meet."""
    roll = random.random()
    if roll < 0.75:
        return frame(random, ids).SerializeToString()
    if roll < 0.85:
        return damaged(random, frame(random, ids).SerializeToString())
    if roll < 0.97:
        return part(random, ids).SerializeToString()
    if roll < 0.995:
        return random.randbytes(random.choice((0, 1, 2, 16, 200)))
    return bytes(random.choice((MAX_FRAME_BYTES, MAX_FRAME_BYTES + FRAME_SLACK_BYTES + 1)))


def session(random: Random, num_messages: int) -> list[bytes]:
    """What one peer sends: rude now and then, never, or all the time. Who is never rude keeps its session."""
    rudeness = random.choice((0.0, 0.02, 0.1, 1.0))
    return [message(random) if random.random() < rudeness else polite(random) for _ in range(num_messages)]


def polite(random: Random) -> bytes:
    """A well formed frame of a kind that has its place in a session."""
    return frame(random, IDS[:-1], _POLITE).SerializeToString()


def frame(random: Random, ids: Sequence[str] = IDS, kinds: Sequence[str] = KINDS) -> pb.Frame:
    """Well formed, of any kind, with anything in its fields."""
    made = pb.Frame()
    kind = random.choice(kinds)
    getattr(made, kind).SetInParent()
    fill(random, getattr(made, kind), ids)
    return made


def part(random: Random, ids: Sequence[str] = IDS) -> pb.Frame:
    """A piece of a message: in order or not, with a frame in it or not."""
    if random.random() < 0.5:
        whole, _ = cut(frame(random, ids).SerializeToString(), RequestKey(random.choice(ids), 0), 0)
        return pb.Frame.FromString(whole)
    payload = random.choice((b"", b"x", bytes(60_000)))
    key = pb.RequestKey(request_id=random.choice(ids), attempt=random.randrange(2))
    return pb.Frame(
        part=pb.Part(key=key, index=random.choice((0, 0, 1, 2, 7)), last=random.random() < 0.3, payload=payload)
    )


def damaged(random: Random, data: bytes) -> bytes:
    """Some bytes changed, left out, doubled or cut off."""
    wire = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(wire) + 1)
        match random.randrange(4):
            case 0 if at < len(wire):
                wire[at] = random.randrange(256)
            case 1:
                wire[at : at + random.randint(0, 3)] = random.randbytes(random.randint(0, 3))
            case 2:
                wire[at:at] = wire[: random.randint(0, 8)]
            case _:
                del wire[at + random.randint(0, 40) :]
    return bytes(wire)


def fill(random: Random, made: Message, ids: Sequence[str], depth: int = 0) -> None:
    """Gives each field something, or leaves it out."""
    for field in made.DESCRIPTOR.fields:
        if random.random() < 0.25 or depth > _DEPTH:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        if not field.is_repeated:
            if field.message_type is None:
                setattr(made, field.name, _value(random, field, ids))
            else:
                getattr(made, field.name).SetInParent()
                fill(random, getattr(made, field.name), ids, depth + 1)
            continue
        count = random.choice((0, 1, 1, 2, 3, 5, 20))
        values = getattr(made, field.name)
        for _ in range(count):
            if field.message_type is None:
                values.append(_value(random, field, ids))
            else:
                fill(random, values.add(), ids, depth + 2)


def _value(random: Random, field: _Field, ids: Sequence[str]) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return random.choice(_BYTES)
        case FieldDescriptor.CPPTYPE_STRING:
            return random.choice(ids) if field.name in ("request_id", "leader_id") else random.choice(IDS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return random.random() < 0.5
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return random.choice(_FLOATS)
        case FieldDescriptor.CPPTYPE_ENUM:
            assert field.enum_type is not None
            return random.choice((*field.enum_type.values_by_number, 99))
        case FieldDescriptor.CPPTYPE_UINT32:
            return random.choice((0, 1, 2, 3, 7, 16, 100, 2**31 - 1, 2**31, 2**32 - 1))
        case FieldDescriptor.CPPTYPE_INT32:
            return random.choice((0, 1, -1, 7, 2**31 - 1, -(2**31)))
        case FieldDescriptor.CPPTYPE_UINT64:
            return random.choice((0, 1, 2, 7, 2**32, 2**63 - 1, 2**63, 2**64 - 1))
        case kind:
            raise AssertionError(f"{field.full_name}: values of type {kind} are not drawn yet")

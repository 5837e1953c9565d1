"""An encoder's final hidden states on their way to whoever asked for them: one message of the Bulk stream.

It goes ahead of the ticket, or of the last frame, that it belongs to; the two streams keep no order between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from cluster.errors import Busy, RequestTooLong
from cluster.parts import MAX_BULK_MESSAGE_BYTES
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.session import Session

STATES_TOPIC: Final = "states"
DTYPE: Final = "float32"
ITEM_BYTES: Final = 4
MAX_STATES_BYTES: Final = MAX_BULK_MESSAGE_BYTES - (4 << 10)  # the rest of the message has room, too


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """[num_tokens, width] float32, little endian, row by row. Raises ValueError for data of another length."""

    num_tokens: int
    width: int
    data: bytes

    def __post_init__(self) -> None:
        if min(self.num_tokens, self.width) < 1 or len(self.data) != self.num_tokens * self.width * ITEM_BYTES:
            raise ValueError(f"{len(self.data)} bytes for hidden states of [{self.num_tokens}, {self.width}] {DTYPE}")

    @classmethod
    def of_rows(cls, data: bytes, num_tokens: int) -> HiddenStates:
        return cls(num_tokens, len(data) // (num_tokens * ITEM_BYTES), data)

    @classmethod
    def read(cls, payload: bytes) -> tuple[RequestKey, HiddenStates]:
        """Whose, and what. Raises ValueError for what is none."""
        try:
            message = pb.States.FromString(payload)
        except DecodeError:
            raise ValueError(f"{len(payload)} bytes are no hidden states") from None
        if message.dtype != DTYPE or len(message.shape) != 2:
            raise ValueError(
                f"hidden states of {message.dtype!r} {list(message.shape)}, not of {DTYPE!r} [rows, width]"
            )
        num_tokens, width = message.shape
        return RequestKey.of(message.key), cls(num_tokens, width, message.data)

    def send(self, session: Session, key: RequestKey) -> None:
        """Raises RequestTooLong for more than a message may hold, Busy where the peer has too much to read."""
        if len(self.data) > MAX_STATES_BYTES:
            raise RequestTooLong(
                f"the hidden states of {key.request_id} have {len(self.data)} bytes, over the {MAX_STATES_BYTES} of a "
                "message; shorten the input",
                "prompt",
            )
        shape = (self.num_tokens, self.width)
        message = pb.States(key=key.wire(), dtype=DTYPE, shape=shape, data=self.data)
        if not session.send_bulk(STATES_TOPIC, message.SerializeToString()):
            raise Busy(f"{session.peer.name} has too much to read already for {len(self.data)} bytes more; retry later")


def heard_states(session: Session, topic: str, payload: bytes) -> tuple[RequestKey, HiddenStates] | None:
    """Of a bulk message to somebody who takes no other; None, and the session ends, for what is none."""
    if topic != STATES_TOPIC:
        session.close(f"nothing listens to bulk topic {topic!r} ({len(payload)} bytes)")
        return None
    try:
        return HiddenStates.read(payload)
    except ValueError as error:
        session.close(f"bad hidden states: {error}")
        return None

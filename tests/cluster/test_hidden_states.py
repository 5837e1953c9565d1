"""A message of hidden states: what is sent is what is read, what is none ends its session, what is too long is told."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from cluster.errors import Busy, RequestTooLong
from cluster.hidden_states import MAX_STATES_BYTES, STATES_TOPIC, HiddenStates, heard_states
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.words_thread import WordsThread
from tests.support.words import Pair, open_pair, words_config

KEY = RequestKey("r", 2)
ROWS = np.arange(6, dtype="<f4").reshape(3, 2)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with WordsThread(config=words_config()) as words:
        yield open_pair(words)


def test_states_arrive_as_they_were_sent(pair: Pair) -> None:
    states = HiddenStates.of_rows(ROWS.tobytes(), 3)
    assert (states.num_tokens, states.width) == (3, 2)
    states.send(pair.accepted, KEY)
    message = pair.at_ingress.wait("bulk")
    assert heard_states(message.session, message.topic, message.payload) == (KEY, states)


def test_what_is_no_message_of_states_ends_its_session(pair: Pair) -> None:
    assert heard_states(pair.dialed, "news", b"") is None
    error = pair.at_ingress.wait("broken").error
    assert error is not None and "nothing listens to bulk topic 'news'" in str(error)
    again = pair.at_ingress.wait("open", 2).session
    assert heard_states(again, STATES_TOPIC, b"\xff") is None
    error = pair.at_ingress.wait("broken", 2).error
    assert error is not None and "1 bytes are no hidden states" in str(error)
    data = ROWS.tobytes()
    for message, told in (
        (pb.States(dtype="float16", shape=[3, 2], data=data), r"of 'float16' \[3, 2\], not of 'float32'"),
        (pb.States(dtype="float32", shape=[6], data=data), r"'float32' \[6\], not of"),
        (pb.States(dtype="float32", shape=[2, 2], data=data), r"24 bytes for hidden states of \[2, 2\]"),
        (pb.States(dtype="float32", shape=[0, 2]), r"0 bytes for hidden states of \[0, 2\]"),
    ):
        with pytest.raises(ValueError, match=told):
            HiddenStates.read(message.SerializeToString())
    with pytest.raises(ValueError, match="23 bytes for hidden states"):
        HiddenStates.of_rows(ROWS.tobytes()[1:], 3)


def test_what_does_not_fit_is_refused_and_nothing_is_sent(pair: Pair) -> None:
    too_long = HiddenStates(MAX_STATES_BYTES // 4 + 1, 1, bytes(MAX_STATES_BYTES + 4))
    with pytest.raises(RequestTooLong, match="over the 67104768 of a message; shorten the input"):
        too_long.send(pair.accepted, KEY)

    async def fill() -> None:  # on the words thread: nothing is written meanwhile
        half = HiddenStates(1, 10 << 20, bytes(40 << 20))
        half.send(pair.accepted, KEY)
        with pytest.raises(Busy, match="has too much to read already for 41943040 bytes more"):
            half.send(pair.accepted, KEY)

    pair.words.wait(fill())
    pair.at_ingress.wait("bulk")
    assert pair.at_ingress.count("bulk") == 1

"""Request headers that Serve reads itself: what it cannot read breaks nothing, what steers it is not obeyed."""

from __future__ import annotations

import json
import re

import pytest

from tests.fuzz.sockets import Wire, request, talk
from tests.support.public_door import MODEL, PublicDoor

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-request-id", b"\xe9"),
        ("x-request-id", "id-é".encode()),
        ("x-request-id", b""),
        ("x-request-id", b"two words"),
        ("x-request-id", b"a" * 129),
        ("x-request-id", b"two words\r\nx-request-id: "),
        ("x-request-timeout-seconds", b"0.001"),
        ("x-request-timeout-seconds", b"soon"),
        ("x-request-disconnect-disabled", b"1"),
        ("serve-multiplexed-model-id", b"another"),
        ("serve_multiplexed_model_id", b"another"),
        ("x-session-id", b"\xff"),
    ],
)
def test_the_request_is_answered_as_without(door: PublicDoor, name: str, value: bytes) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 2}).encode()
    (answer,) = talk(door.url, Wire([request("/v1/completions", body, (name, value))]))
    assert answer.status == 200, answer
    assert re.fullmatch("[0-9a-f-]{32,36}", answer.headers["x-request-id"]), "one that was made here"


def test_the_first_good_id_is_told(door: PublicDoor) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 2}).encode()
    ids = (("x-request-id", b"not one"), ("x-request-id", b"first"), ("x-request-id", b"second"))
    (answer,) = talk(door.url, Wire([request("/v1/completions", body, *ids)]))
    assert answer.status == 200 and answer.headers["x-request-id"] == "first"

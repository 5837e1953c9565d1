"""Errors travel between processes whole."""

from __future__ import annotations

import copy

import pytest

from cluster.errors import Busy, ConfigError, InvalidRequest, Refused, SluiceError, TransferError
from cluster.protos import worker_pb2 as pb


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("kv.memory_bytes", "10 is too little; raise it"),
        InvalidRequest("no prompt", "prompt"),
        Busy("full", retry_after_s=3.0),
        Refused(pb.INCOMPATIBLE, "another model"),
        TransferError("gone"),
    ],
)
def test_a_copy_made_as_for_another_process_says_the_same(error: SluiceError) -> None:
    twin = copy.copy(error)  # by the protocol that serializers use
    assert type(twin) is type(error) and twin is not error
    assert (str(twin), vars(twin)) == (str(error), vars(error))

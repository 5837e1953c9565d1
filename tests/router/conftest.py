"""Sessions and workers that the tests of the router share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from cluster.words_thread import WordsThread
from tests.support.routing import Stage
from tests.support.words import words_config


@pytest.fixture(scope="module")
def words() -> Iterator[WordsThread]:
    with WordsThread(config=words_config(heartbeat_timeout_s=5.0)) as thread:
        yield thread


@pytest.fixture
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack)

"""A front door over one scripted worker, shared by the tests of the HTTP API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.tokenizer import Tokenizer
from tests.support.api import FrontDoor, front_door
from tests.support.scripted_worker import ScriptedWorker
from tests.support.tokenizer_files import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    loaded = Tokenizer.load(directory)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def shared_door(tokenizer: Tokenizer) -> Iterator[FrontDoor]:
    with front_door(tokenizer) as door:
        yield door


@pytest.fixture
def worker(tokenizer: Tokenizer) -> Iterator[ScriptedWorker]:
    """Says a sentence, over and over, with characters that take several tokens."""
    with_text = ScriptedWorker("decode-0")
    with_text.text = tokenizer.backend.encode("the quick 🦊 jumps; never stop here. ").ids
    yield with_text
    with_text.stop()


@pytest.fixture
def door(shared_door: FrontDoor, worker: ScriptedWorker) -> FrontDoor:
    shared_door.connect(worker)
    return shared_door

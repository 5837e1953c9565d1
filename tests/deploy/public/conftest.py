"""One app for all files of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.public_door import PublicDoor, public_door


@pytest.fixture(scope="package")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PublicDoor]:
    with public_door(tmp_path_factory.mktemp("checkpoint")) as door:
        yield door

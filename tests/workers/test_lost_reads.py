"""Reads that fail while the session to their source is open: the transport may hear of a death before gRPC does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.rpc import WordsThread
from tests.support.pull_scene import KEY, PullScene
from tests.support.words import words_config
from workers.supply import RETRY_S


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[PullScene]:
    with WordsThread(config=words_config(heartbeat_timeout_s=60)) as words:
        scene = PullScene(words, tmp_path, local_allowed=False)
        yield scene
        scene.stage.cancel(scene.to_ingress.accepted, KEY, scene.clock.now)
        assert scene.stage.num_open == 0
        scene.close()


def test_one_death_heard_of_twice_is_one_death(scene: PullScene) -> None:
    scene.fabric.kill("source/0")
    scene.tick(0.0)
    assert not scene.is_pulling(), "the read failed, and nobody else is there"
    scene.tick(2 * RETRY_S)
    assert not scene.is_pulling(), "the dead one is not asked again"
    scene.break_session()
    scene.tick(2 * RETRY_S)
    assert scene.stage.num_open == 1, "it waits for another source"


def test_a_source_that_can_be_read_after_all_is_asked_again(scene: PullScene) -> None:
    scene.fabric.fail("source/0")
    scene.fabric.resume("source/0")
    scene.tick(0.0)
    assert scene.pairs.warm(scene.session.peer.incarnation) is None
    scene.measure()
    assert scene.pairs.warm(scene.session.peer.incarnation) is scene.session
    scene.tick(2 * RETRY_S)
    assert scene.is_pulling()

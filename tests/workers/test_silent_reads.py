"""Reads that never report, from a source whose session broke: decode gives them up, and not their blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.rpc import WordsThread
from tests.support.kv_builders import STUCK_S, T_S
from tests.support.pull_scene import KEY, PullScene
from tests.support.words import words_config
from workers.fetch import SILENT_READ_S


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[PullScene]:
    with WordsThread(config=words_config(heartbeat_timeout_s=60)) as words:
        scene = PullScene(words, tmp_path)
        yield scene
        scene.close()


def test_they_are_given_up_after_the_allowed_silence_and_the_prompt_is_computed_here(scene: PullScene) -> None:
    scene.break_session()
    assert scene.is_pulling(), "a broken session alone ends no read: it may be about to complete"
    scene.tick(SILENT_READ_S)
    assert scene.is_pulling()
    scene.tick(0.01)
    assert not scene.is_pulling()
    assert scene.num_filling == 3, "what a read may still write to is nobody's"
    scene.tick(0.1)  # past the pause before the next try
    assert scene.parts.scheduler.num_waiting == 1 and scene.parts.engine.has_work
    outcome = scene.parts.engine.step()
    assert outcome is not None and outcome.error is None
    [emitted] = outcome.tokens
    assert emitted.first_token_index == 1, "the first token was told by the source"
    assert scene.num_filling == 3 + 1, "the read's, and the last of its own, which is not full"

    scene.fabric.resume("source/0")
    scene.tick(0.01)
    assert scene.num_filling == 1 and scene.parts.sink.num_in_flight == 0
    scene.stage.cancel(scene.to_ingress.accepted, KEY, scene.clock.now)
    assert scene.stage.num_open == 0
    counts = scene.parts.blocks.counts(0)
    assert counts.free + counts.cached == 16


def test_those_that_are_given_up_are_quarantined_until_they_come_after_all(scene: PullScene) -> None:
    scene.break_session()
    scene.tick(SILENT_READ_S + 0.01)
    scene.stage.cancel(scene.to_ingress.accepted, KEY, scene.clock.now)
    assert scene.num_filling == 3
    scene.tick(STUCK_S)
    counts = scene.parts.blocks.counts(0)
    assert (counts.filling, counts.quarantined) == (0, 3)
    scene.tick(100 * T_S)
    assert scene.parts.blocks.counts(0).quarantined == 3, "they may be written still"
    scene.fabric.resume("source/0")
    scene.tick(0.01)
    assert scene.parts.blocks.counts(0).free == 16
    assert scene.stage.num_open == 0


def test_a_read_from_a_source_whose_session_is_open_is_waited_for(scene: PullScene) -> None:
    scene.tick(10 * SILENT_READ_S)
    assert scene.is_pulling() and scene.parts.sink.num_in_flight == 1
    scene.fabric.resume("source/0")
    scene.tick(0.0)
    assert not scene.is_pulling() and scene.parts.scheduler.num_running + scene.parts.scheduler.num_waiting == 1
    scene.stage.cancel(scene.to_ingress.accepted, KEY, scene.clock.now)
    assert scene.stage.num_open == 0


def test_a_read_that_completes_within_the_silence_counts(scene: PullScene) -> None:
    scene.break_session()
    scene.fabric.resume("source/0")
    scene.tick(SILENT_READ_S)
    assert not scene.is_pulling() and scene.num_filling == 0, "all blocks came: nothing is computed again"
    assert scene.parts.scheduler.num_running + scene.parts.scheduler.num_waiting == 1

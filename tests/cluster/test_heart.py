from __future__ import annotations

from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.heart import Heart, Liveness, StepAge, no_engine
from cluster.protos import worker_pb2 as pb


class Peer:
    """Keeps the heartbeats it is given."""

    def __init__(self, awaited: int = 1) -> None:
        self.beats: list[pb.Heartbeat] = []
        self.awaited = awaited
        self.enough = Event()

    def beat(self, frame: bytes) -> None:
        self.beats.append(pb.Frame.FromString(frame).heartbeat)
        if len(self.beats) >= self.awaited:
            self.enough.set()


def test_a_heart_beats_for_all_its_peers_from_its_own_thread_until_stopped() -> None:
    heart = Heart(lambda: StepAge(1.25, True), interval_s=0.01)
    first, second = Peer(3), Peer(3)
    heart.add(first)
    heart.add(second)
    heart.start()
    assert first.enough.wait(10) and second.enough.wait(10)
    heart.stop()
    num_beats = len(first.beats)
    assert [beat.sequence for beat in first.beats] == list(range(1, num_beats + 1))
    assert all(beat.step_age_ms == 1250 and beat.has_work for beat in first.beats)


def test_a_removed_peer_hears_nothing_more() -> None:
    heart, peer = Heart(no_engine), Peer()
    heart.add(peer)
    heart.beat()
    heart.remove(peer)
    heart.remove(peer)
    heart.beat()
    assert len(peer.beats) == 1
    heart.stop()


def test_a_step_age_without_bound_still_fits_the_wire() -> None:
    heart, peer = Heart(lambda: StepAge(1e9, True)), Peer()
    heart.add(peer)
    heart.beat()
    assert peer.beats[0].step_age_ms == 2**32 - 1


@given(st.lists(st.booleans(), max_size=60))
def test_a_peer_is_lost_after_exactly_the_allowed_number_of_silent_intervals(heard: list[bool]) -> None:
    liveness = Liveness(interval_s=0.25, timeout_s=1.5)
    silent = 0
    for beat in heard:
        if beat:
            liveness.heard(pb.Heartbeat())
            silent = 0
            continue
        silent += 1
        assert bool(liveness.tick()) == (silent > 6)


@pytest.mark.parametrize(
    ("interval_s", "timeout_s", "allowed"), [(0.25, 1.5, 6), (0.3, 1.5, 5), (0.4, 1.5, 4), (1, 1, 2)]
)
def test_the_allowance_is_the_timeout_in_intervals(interval_s: float, timeout_s: float, allowed: int) -> None:
    liveness = Liveness(interval_s=interval_s, timeout_s=timeout_s)
    assert [bool(liveness.tick()) for _ in range(allowed + 1)] == [False] * allowed + [True]
    assert liveness.tick().startswith("no heartbeat for")


@given(st.integers(0, 20_000), st.booleans())
def test_a_peer_with_work_that_does_not_step_is_unhealthy(step_age_ms: int, has_work: bool) -> None:
    liveness = Liveness(step_timeout_s=5.0)
    liveness.heard(pb.Heartbeat(step_age_ms=step_age_ms, has_work=has_work))
    reason = liveness.tick()
    assert bool(reason) == (has_work and step_age_ms > 5000)
    assert not reason or reason.startswith("no step for")


def test_a_peer_that_steps_again_is_healthy_again() -> None:
    liveness = Liveness()
    liveness.heard(pb.Heartbeat(step_age_ms=9000, has_work=True))
    assert liveness.tick()
    liveness.heard(pb.Heartbeat(step_age_ms=9, has_work=True))
    assert not liveness.tick()

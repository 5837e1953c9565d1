from __future__ import annotations

import numpy as np
import pytest

from tests.chaos.flatness import NUM_PIECES, flatness

SECONDS = [float(second) for second in range(400)]
NOISE = np.random.default_rng(0).normal(0, 5, len(SECONDS))


def test_noise_is_flat_however_loud() -> None:
    assert flatness(SECONDS, list(100 + NOISE), allowed=0.0).flat
    assert flatness(SECONDS, list(100 + 50 * NOISE), allowed=0.0).flat


def test_a_leak_under_noise_is_found() -> None:
    found = flatness(SECONDS, list(100 + NOISE + 0.05 * np.arange(400)), allowed=2.0)
    assert not found.flat
    assert found.growth == pytest.approx(15, abs=3) and found.noise < 3


def test_what_is_allowed_is_flat_and_what_shrinks_too() -> None:
    assert flatness(SECONDS, list(0.05 * np.arange(400)), allowed=16.0).flat
    assert not flatness(SECONDS, list(0.05 * np.arange(400)), allowed=14.0).flat
    assert flatness(SECONDS, list(-1.0 * np.arange(400)), allowed=0.0).flat


def test_one_more_handle_for_good_is_found() -> None:
    assert not flatness(SECONDS, [20.0 + second // 50 for second in SECONDS], allowed=2.0).flat
    assert flatness(SECONDS, [20.0] * 400, allowed=0.0).flat


def test_the_warm_up_does_not_count() -> None:
    filling = [min(100.0, 2 * second) for second in SECONDS]
    assert flatness(SECONDS, filling, allowed=0.0).growth == pytest.approx(0, abs=1e-9)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="samples after the warm-up"):
        flatness(SECONDS[:NUM_PIECES], [1.0] * NUM_PIECES, allowed=0.0)

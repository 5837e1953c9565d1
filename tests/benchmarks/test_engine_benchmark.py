from __future__ import annotations

import time

import pytest

from benchmarks import engine


def test_overhead_is_told_for_each_part() -> None:
    figures = engine.overhead(num_sequences=4, num_steps=3, repeats=1)
    assert [figure.name for figure in figures] == [
        "schedule",
        "mirror and batch",
        "schedule, mirror and batch",
        "settle",
    ]
    assert all(figure.value > 0 for figure in figures)


def test_throughput_against_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"vocab_size": 512, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    monkeypatch.setattr(engine, "SHAPE", {**engine.SHAPE, **tiny})
    figures = {f.name: f for f in engine.throughput([2], engine.Stopwatch(time.perf_counter, 1), num_requests=3)}
    sluice = figures["sluice"]
    assert sluice.bound is not None and sluice.value > 0
    assert "of 3 requests token for token" in sluice.note
    assert {"transformers", "sluice / transformers by prompt length", "sluice / transformers by output length"} <= set(
        figures
    )

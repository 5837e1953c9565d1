"""Being asked to stop, also where a library gets hold of it first."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from deploy.signals import Stop, StopSignals


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals = StopSignals()
    signals.take()
    yield signals
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_either_is_an_interrupt_that_names_itself(signals: StopSignals, number: signal.Signals) -> None:
    assert not signals.asked
    with pytest.raises(KeyboardInterrupt, match=number.name) as raised:
        os.kill(os.getpid(), number)
    assert raised.type is Stop


def test_one_that_was_swallowed_is_known(signals: StopSignals) -> None:
    with pytest.raises(ValueError, match="of its own"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as stop:
            raise ValueError("of its own") from stop
    assert signals.asked
    signals.ignore()
    os.kill(os.getpid(), signal.SIGTERM)

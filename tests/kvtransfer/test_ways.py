"""Which of several ways is the fastest."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import TransferError
from kvtransfer.ways import BEATEN, READS, Trial


def test_one_way_is_read_by_once_for_the_connection_and_then_timed() -> None:
    trial = Trial(["only"], 100)
    for seconds in (9.0, 0.5, 0.2, 0.4):
        assert not trial.over and trial.way == "only"
        trial.took(seconds)
    assert trial.over and (trial.best, trial.rates) == ("only", {"only": 500.0})


def test_one_that_is_far_behind_is_not_read_by_again() -> None:
    trial = Trial(["fast", "slow", "slightly slower"], 100)
    seconds = {"fast": 1.0, "slow": 1.01 / BEATEN, "slightly slower": 0.99 / BEATEN}
    taken: list[str] = []
    while not trial.over:
        taken.append(trial.way)
        trial.took(seconds[trial.way])
    assert [taken.count(way) for way in seconds] == [READS + 1, 2, READS + 1]
    assert trial.best == "fast" and list(trial.rates) == list(seconds)


def test_one_that_fails_late_is_out_with_what_it_did_before() -> None:
    trial = Trial(["first", "second"], 100)
    trial.took(1.0)
    trial.took(0.1)
    trial.failed(TransferError("gone"))
    while not trial.over:
        assert trial.way == "second"
        trial.took(5.0)
    assert (trial.best, trial.rates, str(trial.error)) == ("second", {"second": 20.0}, "gone")


def test_when_all_fail_the_first_error_is_told() -> None:
    trial = Trial(["first", "second"], 100)
    trial.failed(TransferError("one"))
    trial.failed(TransferError("two"))
    assert trial.over and (trial.best, str(trial.error)) == (None, "one")


@given(st.lists(st.lists(st.floats(1e-6, 10.0), min_size=READS + 1, max_size=READS + 1), min_size=1, max_size=4))
def test_the_fastest_read_of_those_that_were_made_wins(seconds: list[list[float]]) -> None:
    ways = [str(index) for index in range(len(seconds))]
    trial = Trial(ways, 1000)
    timed: dict[str, list[float]] = {way: [] for way in ways}
    counts = dict.fromkeys(ways, 0)
    while not trial.over:
        way = trial.way
        took = seconds[int(way)][counts[way]]
        if counts[way]:
            timed[way].append(took)
        counts[way] += 1
        trial.took(took)
    assert all(1 <= len(taken) <= READS for taken in timed.values())
    assert trial.best is not None and min(timed[trial.best]) == min(min(taken) for taken in timed.values())

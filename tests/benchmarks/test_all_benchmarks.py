"""`python -m benchmarks`: the file that it writes."""

from benchmarks.__main__ import COMMANDS, QUICK, merged


def test_what_was_not_measured_now_keeps_its_figures() -> None:
    before = [{"benchmark": name, "run": 1} for name in ("engine", "gone", "transfer", "serving")]
    now = [{"benchmark": name, "run": 2} for name in ("serving", "overhead")]
    found = [(report["benchmark"], report["run"]) for report in merged(before, now)]
    assert found == [("transfer", 1), ("engine", 1), ("overhead", 2), ("serving", 2), ("gone", 1)]


def test_commands_are_of_benchmarks() -> None:
    assert COMMANDS.keys() <= QUICK.keys()

"""The commands there are, and what their help says."""

from __future__ import annotations

import pytest

from deploy.__main__ import COMMANDS, main


def test_the_set_of_commands() -> None:
    """Adding one is fine, renaming or removing one breaks somebody's script."""
    assert COMMANDS == ("serve", "generate", "demo", "doctor", "check-config")


def help_of(*words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of(capsys=capsys, monkeypatch=monkeypatch)
    assert [command for command in COMMANDS if f"\n    {command}" not in text] == []
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_config_and_set_and_explains_itself(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(command, capsys=capsys, monkeypatch=monkeypatch)
    assert "--config FILE" in text and "--set KEY=VALUE" in text
    assert max(map(len, text.splitlines())) <= 80


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["server"])
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert [command for command in COMMANDS if command not in errors] == []

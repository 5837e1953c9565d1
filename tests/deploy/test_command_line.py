"""The commands there are, all that they take, and what their help says.

Adding a command or an option is fine; renaming one, removing one or changing a default breaks somebody's script.
"""

from __future__ import annotations

import argparse

import pytest

from deploy.__main__ import COMMANDS, main, make_parser
from deploy.commands.demo import PROMPT

CONFIG = {"--config FILE": None, "--set KEY=VALUE": []}
MODEL = {"--model DIR": None, "--load-format {auto,dummy}": None}
FROZEN: dict[str, dict[str, object]] = {
    "serve": {**MODEL, **CONFIG, "--port P": None},
    "generate": {
        **MODEL,
        **CONFIG,
        "--input IN.jsonl": "required",
        "--output OUT.jsonl": "required",
        "--resume": False,
        "--cluster": False,
        "--aggregated": False,
        "--explain": False,
    },
    "chat": {
        **MODEL,
        **CONFIG,
        "--url URL": None,
        "--system TEXT": None,
        "--max-tokens N": None,
        "--temperature T": 1.0,
    },
    "demo": {**CONFIG, "--json FILE": None, "--prompt": PROMPT, "--max-tokens N": 48, "--cache DIR": "…/.cache"},
    "doctor": {**MODEL, **CONFIG, "--no-transfer": False},
    "check-config": {**MODEL, **CONFIG},
}


def surface() -> dict[str, dict[str, object]]:
    """What the parsers take, as FROZEN writes it."""
    actions = make_parser()._actions
    (subparsers,) = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    return {
        name: {_written(action): _default(action) for action in parser._actions if action.dest != "help"}
        for name, parser in subparsers.choices.items()
    }


def _written(action: argparse.Action) -> str:
    assert action.option_strings, f"{action.dest}: what has no name cannot get company later"
    value = "{" + ",".join(action.choices) + "}" if action.choices else action.metavar
    return " ".join([*action.option_strings, *([value] if isinstance(value, str) else [])])


def _default(action: argparse.Action) -> object:
    if action.required:
        return "required"
    return "…/.cache" if str(action.default).endswith("/.cache") else action.default


def test_the_commands_and_what_they_take() -> None:
    assert surface() == FROZEN
    assert tuple(FROZEN) == COMMANDS


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
def test_every_command_explains_itself(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(command, capsys=capsys, monkeypatch=monkeypatch)
    assert "--config FILE" in text and "--set KEY=VALUE" in text
    assert max(map(len, text.splitlines())) <= 80


def refused(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    errors = refused("server", capsys=capsys)
    assert [command for command in COMMANDS if command not in errors] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_options_are_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--input", "i", "--output", "o") if command == "generate" else ()
    assert "unrecognized arguments: --no-such" in refused(command, *files, "--no-such", capsys=capsys)


def test_options_are_not_guessed_from_their_beginnings(capsys: pytest.CaptureFixture[str]) -> None:
    """An abbreviation that works today is ambiguous tomorrow."""
    assert "unrecognized arguments: --mod x" in refused("serve", "--mod", "x", capsys=capsys)


def test_options_that_are_needed_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--input, --output" in refused("generate", "--model", "m", capsys=capsys)

"""The screen is ours, whatever writes to it meanwhile; a failure names the file where the rest went."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import SluiceError
from deploy.silence import logged


def test_only_the_console_reaches_the_screen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "new" / "a.log"
    with logged(log) as console:
        os.write(1, b"one library\n")
        os.write(2, b"another library\n")
        subprocess.run([sys.executable, "-c", "print('a child')"], check=True)
        assert log.read_text().splitlines() == ["one library", "another library", "a child"]
        console.print("✓ ours")
    print("afterwards")
    assert capfd.readouterr() == ("✓ ours\nafterwards\n", "")
    assert not log.exists()


def test_the_other_stream(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with logged(tmp_path / "a.log", screen=2) as console:
        console.print("ours")
        os.write(1, b"not ours\n")
    assert capfd.readouterr() == ("", "ours\n")


def test_a_failure_names_the_log(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with pytest.raises(SluiceError, match=f"^no model\nWhat was said meanwhile: {log}$"), logged(log):
        os.write(2, b"a hint\n")
        raise SluiceError("no model")
    assert log.read_text() == "a hint\n"


def test_a_failure_about_which_nothing_was_said_names_none(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with pytest.raises(SluiceError, match=r"^no model$"), logged(log):
        raise SluiceError("no model")
    assert not log.exists()


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(SluiceError, match=r"cannot be written \(File exists\)"),
        logged(tmp_path / "file" / "a.log"),
    ):
        pass

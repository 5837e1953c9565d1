"""The guard of tests/conftest.py, watched from outside: a run of its own in a temporary folder."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LISTED = "import pytest\ndef test_a(): pytest.skip('needs an NVIDIA GPU')\n"
UNLISTED = "import pytest\ndef test_a(): pytest.skip('no time')\n"
WHOLE_FILE = "import pytest\npytest.skip('no module', allow_module_level=True)\n"
EXPECTED = "import pytest\n@pytest.mark.xfail(reason='later')\ndef test_a(): assert False\n"
PASSING = "def test_b(): pass\n"


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (LISTED, 0, "1 skipped"),
        (UNLISTED, 1, "test_one.py::test_a: Skipped: no time"),
        (WHOLE_FILE, 1, "test_one.py: Skipped: no module"),
        (EXPECTED, 1, "test_one.py::test_a: expected to fail: later"),
    ],
)
def test_only_listed_skips_pass(tmp_path: Path, text: str, code: int, said: str) -> None:
    for name in ("conftest.py", "allowed_skips.txt"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "test_one.py").write_text(text + PASSING)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout
    assert said in done.stdout

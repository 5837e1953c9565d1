"""The file of keys: what is read, and what is refused without showing a key."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from deploy.api_keys import ApiKeys

KEY = "sk-0123456789abcdef"


def written(folder: Path, text: str) -> Path:
    path = folder / "keys"
    path.write_text(text)
    return path


def test_keys_have_names(tmp_path: Path) -> None:
    digest = sha256(b"sk-of-bob-0123456789").hexdigest()
    keys = ApiKeys.read(written(tmp_path, f"# clients\n\nann  {KEY}\nbob sha256:{digest.upper()}\n"))
    assert keys.name_of(KEY) == "ann" and keys.name_of("sk-of-bob-0123456789") == "bob"
    for stranger in (
        "",
        "ann",
        KEY[:-1],
        f"{KEY} ",
        digest,
        f"sha256:{digest}",
        "\ud800".encode("utf-8", "replace").decode(),
    ):
        assert keys.name_of(stranger) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no key"),
        ("# none\n", "has no key"),
        (f"{KEY}\n", "line 1: write NAME KEY"),
        (f"ann {KEY}\nann {KEY}x\n", "line 2: ann is there twice"),
        ("ann short\n", "line 1: the key has 5 characters"),
        ("ann sha256:abc\n", "line 1: a digest is 64"),
    ],
)
def test_what_is_no_file_of_keys(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        ApiKeys.read(written(tmp_path, text))
    assert refused.value.path == "http.api_keys_file" and KEY not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="put it there"):
        ApiKeys.read(tmp_path / "nothing")

"""The file of keys: what is read, and what is refused without showing a key."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from cluster.errors import ConfigError, InvalidRequest, RequestTooLong
from deploy.api_keys import ApiKey, ApiKeys, KeyLimits

KEY = "sk-0123456789abcdef"


def written(folder: Path, text: str) -> Path:
    path = folder / "keys"
    path.write_text(text)
    return path


def test_keys_have_names(tmp_path: Path) -> None:
    digest = sha256(b"sk-of-bob-0123456789").hexdigest()
    keys = ApiKeys.read(written(tmp_path, f"# clients\n\nann  {KEY}\nbob sha256:{digest.upper()}\n"))
    assert keys.find(KEY) == ApiKey("ann") and keys.find("sk-of-bob-0123456789") == ApiKey("bob")
    for stranger in (
        "",
        "ann",
        KEY[:-1],
        f"{KEY} ",
        digest,
        f"sha256:{digest}",
        "\ud800".encode("utf-8", "replace").decode(),
    ):
        assert keys.find(stranger) is None


def test_keys_have_limits() -> None:
    lines = [f"ann {KEY} requests_per_minute=60 max_concurrent=2 cache_salt=a=b weight=3", "bob other-key-0123456789"]
    keys = ApiKeys.parse(lines, "variable KEYS", "http.api_keys_env")
    limits = KeyLimits(requests_per_minute=60, max_concurrent=2, cache_salt="a=b", weight=3)
    assert keys.find(KEY) == ApiKey("ann", limits) and keys.find("other-key-0123456789") == ApiKey("bob")
    assert "a=b" not in repr(keys.find(KEY)) and KEY not in repr(vars(keys))
    with pytest.raises(ConfigError, match="variable KEYS has no key") as refused:
        ApiKeys.parse([], "variable KEYS", "http.api_keys_env")
    assert refused.value.path == "http.api_keys_env"


def test_prompts_and_answers_are_bounded_by_the_key() -> None:
    key = ApiKey("ann", KeyLimits(max_prompt_tokens=10, max_tokens=5))
    key.check(10, "prompt")
    with pytest.raises(RequestTooLong, match="prompt: 11 tokens are over your key's limit of 10"):
        key.check(11, "prompt")
    assert (key.bound(5, asked=True), key.bound(4, asked=False), key.bound(400, asked=False)) == (5, 4, 5)
    with pytest.raises(InvalidRequest, match="max_tokens: 6 is over your key's limit of 5"):
        key.bound(6, asked=True)
    assert ApiKey("bob").bound(10**9, asked=True) == 10**9


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no key"),
        ("# none\n", "has no key"),
        (f"{KEY}\n", "line 1: write NAME KEY"),
        (f"ann {KEY}\nann {KEY}x\n", "line 2: ann is there twice"),
        ("ann short\n", "line 1: the key has 5 characters"),
        ("ann sha256:abc\n", "line 1: a digest is 64"),
        (f"ann {KEY} fast\n", "line 1: after the key come limits as NAME=VALUE; there are requests_per_minute, "),
        (f"ann {KEY} speed=1\n", "line 1: after the key come limits"),
        (f"ann {KEY} weight=0\n", "line 1: weight: '0' is no whole number above 0"),
        (f"ann {KEY} weight=1 weight=2\n", "line 1: weight is there twice"),
        (f"ann {KEY} cache_salt=\n", "line 1: cache_salt has 0 characters"),
        (f"ann {KEY} cache_salt=a cache_salt=b\n", "line 1: cache_salt is there twice"),
    ],
)
def test_what_is_no_file_of_keys(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        ApiKeys.read(written(tmp_path, text))
    assert refused.value.path == "http.api_keys_file" and KEY not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="put it there"):
        ApiKeys.read(tmp_path / "nothing")

"""The keys that clients may show: named, kept as digests, compared in constant time, each with its limits.

The file, or the secret in an environment variable, has a line per key, blank lines and lines that begin with # aside:

    NAME KEY [LIMIT=VALUE …]                  the key itself
    NAME sha256:HEXDIGITS [LIMIT=VALUE …]     or what `printf %s KEY | sha256sum` says of it

The limits are the fields of `KeyLimits`. It is read once, when a replica starts.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Final

from cluster.errors import ConfigError, InvalidRequest, RequestTooLong

FILE: Final = "http.api_keys_file"
ENV: Final = "http.api_keys_env"
MIN_KEY_CHARS: Final = 16  # a digest of less can be guessed
MAX_SALT_CHARS: Final = 256
_DIGEST: Final = re.compile(r"sha256:([0-9a-fA-F]{64})")
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,11}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """Of one key, over all ingress replicas, which divide them. None: no limit."""

    requests_per_minute: int | None = None  # as many at once after a quiet minute
    tokens_per_minute: int | None = None  # of prompts and answers
    max_concurrent: int | None = None  # HTTP requests that are open
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None  # of an answer
    weight: int = 1  # of its share, where requests wait for their turn
    cache_salt: str = field(default="", repr=False)  # its prefix caches are its own


@dataclass(frozen=True, slots=True)
class ApiKey:
    name: str
    limits: KeyLimits = KeyLimits()

    def check(self, num_prompt_tokens: int, param: str) -> None:
        """Raises RequestTooLong."""
        limit = self.limits.max_prompt_tokens
        if limit is not None and num_prompt_tokens > limit:
            raise RequestTooLong(f"{param}: {num_prompt_tokens} tokens are over your key's limit of {limit}", param)

    def bound(self, max_tokens: int, *, asked: bool) -> int:
        """How long an answer may be. Raises InvalidRequest where more was asked for."""
        limit = self.limits.max_tokens
        if limit is None or max_tokens <= limit:
            return max_tokens
        if asked:
            raise InvalidRequest(
                f"max_tokens: {max_tokens} is over your key's limit of {limit}; lower it", "max_tokens"
            )
        return limit


class ApiKeys:
    def __init__(self, digests: Mapping[str, bytes], limits: Mapping[str, KeyLimits] | None = None) -> None:
        """By name: SHA-256 of the keys, and their limits, where they have any."""
        limits = limits or {}
        self._digests = [(ApiKey(name, limits.get(name, KeyLimits())), digest) for name, digest in digests.items()]

    @classmethod
    def read(cls, path: str | Path) -> ApiKeys:
        """Raises ConfigError, which shows no key."""
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(FILE, f"{path} cannot be read on this node ({error}); put it there") from None
        return cls.parse(lines, str(path), FILE)

    @classmethod
    def parse(cls, lines: Iterable[str], source: str, config_key: str) -> ApiKeys:
        """`source`: what errors call it. Raises ConfigError, which shows no key."""
        digests: dict[str, bytes] = {}
        limits: dict[str, KeyLimits] = {}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            name, where = words[0], f"{source}, line {number}"
            try:
                if len(words) < 2:
                    raise ValueError("write NAME KEY or NAME sha256:HEXDIGITS, and limits after it")
                if name in digests:
                    raise ValueError(f"{name} is there twice; rename one")
                digests[name] = _digest(words[1])
                limits[name] = _limits(words[2:])
            except ValueError as error:
                raise ConfigError(config_key, f"{where}: {error}") from None
        if not digests:
            raise ConfigError(
                config_key, f"{source} has no key, so nobody could come in; add one, or remove {config_key}"
            )
        return cls(digests, limits)

    def find(self, key: str) -> ApiKey | None:
        """Takes as long for any key."""
        digest = sha256(key.encode()).digest()
        found = [known for known, of_known in self._digests if hmac.compare_digest(digest, of_known)]
        return found[0] if found else None


def _digest(word: str) -> bytes:
    if word.startswith("sha256:"):
        match = _DIGEST.fullmatch(word)
        if match is None:
            raise ValueError("a digest is 64 hexadecimal digits after sha256:")
        return bytes.fromhex(match[1])
    if len(word) < MIN_KEY_CHARS:
        raise ValueError(f"the key has {len(word)} characters; take at least {MIN_KEY_CHARS}")
    return sha256(word.encode()).digest()


def _limits(words: Iterable[str]) -> KeyLimits:
    names = [field.name for field in fields(KeyLimits)]
    values: dict[str, int] = {}
    salt = ""
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in names:
            raise ValueError(f"after the key come limits as NAME=VALUE; there are {', '.join(names)}")
        if name in values or (name == "cache_salt" and salt):
            raise ValueError(f"{name} is there twice; remove one")
        if name == "cache_salt":
            if not 0 < len(value) <= MAX_SALT_CHARS:
                raise ValueError(f"cache_salt has {len(value)} characters; take 1 to {MAX_SALT_CHARS}")
            salt = value
        elif _NUMBER.fullmatch(value) is None:
            raise ValueError(f"{name}: {value[:40]!r} is no whole number above 0")
        else:
            values[name] = int(value)
    return KeyLimits(**values, cache_salt=salt)

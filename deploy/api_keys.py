"""The keys that clients may show: named, kept as digests, compared in constant time.

The file has a line per key, blank lines and lines that begin with # aside:

    NAME KEY                  the key itself
    NAME sha256:HEXDIGITS     or what `printf %s KEY | sha256sum` says of it
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final

from cluster.errors import ConfigError

PATH: Final = "http.api_keys_file"
MIN_KEY_CHARS: Final = 16  # a digest of less can be guessed
_DIGEST: Final = re.compile(r"sha256:([0-9a-fA-F]{64})")


class ApiKeys:
    def __init__(self, digests: Mapping[str, bytes]) -> None:
        """By name, SHA-256."""
        self._digests = dict(digests)

    @classmethod
    def read(cls, path: str | Path) -> ApiKeys:
        """Raises ConfigError, which shows no key."""
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(PATH, f"{path} cannot be read on this node ({error}); put it there") from None
        digests: dict[str, bytes] = {}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            name = words[0]
            if len(words) != 2:
                raise ConfigError(PATH, f"{path}, line {number}: write NAME KEY or NAME sha256:HEXDIGITS")
            if name in digests:
                raise ConfigError(PATH, f"{path}, line {number}: {name} is there twice; rename one")
            digests[name] = _digest(words[1], f"{path}, line {number}")
        if not digests:
            raise ConfigError(PATH, f"{path} has no key, so nobody could come in; add one, or remove {PATH}")
        return cls(digests)

    def name_of(self, key: str) -> str | None:
        """Whose key it is. Takes as long for any key."""
        digest = sha256(key.encode()).digest()
        found = [name for name, known in self._digests.items() if hmac.compare_digest(digest, known)]
        return found[0] if found else None


def _digest(word: str, where: str) -> bytes:
    if word.startswith("sha256:"):
        match = _DIGEST.fullmatch(word)
        if match is None:
            raise ConfigError(PATH, f"{where}: a digest is 64 hexadecimal digits after sha256:")
        return bytes.fromhex(match[1])
    if len(word) < MIN_KEY_CHARS:
        raise ConfigError(PATH, f"{where}: the key has {len(word)} characters; take at least {MIN_KEY_CHARS}")
    return sha256(word.encode()).digest()
